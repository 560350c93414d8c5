// How the work of a linear is cut for a device, and its launch.
#include <algorithm>
#include <limits>

#include "counters.h"
#include "linear.h"
#include "linear_launch.h"

namespace autoq::cuda {
namespace {

// Blocks that may share a tile, on average.
constexpr int64_t kMostSharing = 4;

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

bool takes_warpgroups(const DeviceProperties& device, int bits) {
    return has_warpgroups() && device.major == 9 && bits == kWarpgroupBits;
}

int stages_of(const PackedWeight& weight) { return ceil_div(weight.units, kStageUnits); }

int input_rows_of(const LinearPlan& plan, int64_t rows) {
    const int most = plan.row_tiles * kTileRows;
    return plan.warpgroups ? most : static_cast<int>(std::min<int64_t>(rows, most));
}

int row_parts_of(const LinearPlan& plan, int64_t rows) { return ceil_div(rows, plan.row_tiles * kTileRows); }

int64_t tiles_of(const LinearPlan& plan, const PackedWeight& weight, int64_t rows) {
    return static_cast<int64_t>(ceil_div(weight.row_blocks, 2 * plan.warps_across)) * row_parts_of(plan, rows);
}

// Of the sums of all warps of a tile.
int64_t sums_bytes(const LinearPlan& plan) { return int64_t{plan.warps_across} * 32 * plan.row_tiles * 8 * 4; }

// What the blocks leave of their shared tiles.
int64_t shared_tiles_bytes(const LinearPlan& plan) { return plan.whole_tiles ? 0 : 2 * plan.blocks * sums_bytes(plan); }

int64_t shared_bytes(const LinearPlan& plan, const PackedWeight& weight, int64_t rows) {
    LinearArguments a{};
    a.warps_across = plan.warps_across;
    a.input_rows = input_rows_of(plan, rows);
    return int64_t{plan.slices} * kStages * a.stage_bytes(weight.bits) + kFlagBytes +
           (plan.slices - 1) * sums_bytes(plan);
}

// Warps side by side share their input: the more rows, the more of them, and the fewer slices, whose sums have to be
// added. As many slices and rows at a time as there is shared memory for.
bool choose_tile(const PackedWeight& weight, int64_t rows, const DeviceProperties& device, LinearPlan& plan) {
    const int64_t shared_limit = device.shared_bytes_per_block;
    plan.warpgroups = rows >= kLeastWarpgroupRows && takes_warpgroups(device, weight.bits);
    if (plan.warpgroups) {
        plan.row_tiles = kWarpgroupRowTiles;
        plan.warps_across = kWarpgroupWarps;
        plan.slices = 1;
        if (shared_bytes(plan, weight, rows) <= shared_limit) return true;
    }
    plan.warpgroups = false;
    const int row_tiles = rows <= 8 ? 1 : rows <= 16 && weight.bits == 4 ? 2 : rows <= 32 ? 4 : 8;
    for (plan.row_tiles = row_tiles; plan.row_tiles >= 1; plan.row_tiles /= 2) {
        if (!has_kernel(weight.bits, plan.row_tiles)) continue;
        // Half as many warps rather than rows: what is left out of these is read again.
        const int least = (plan.row_tiles + 1) / 2;
        for (plan.warps_across = std::min(plan.row_tiles, 4); plan.warps_across >= least; plan.warps_across /= 2) {
            for (plan.slices = 8 / plan.warps_across; plan.slices >= 1; plan.slices /= 2) {
                if (shared_bytes(plan, weight, rows) <= shared_limit) return true;
            }
        }
    }
    return false;
}

// Blocks without shared tiles where these keep nine tenths of the multiprocessors busy, else as even as can be.
void choose_blocks(const PackedWeight& weight, int64_t rows, const DeviceProperties& device, LinearPlan& plan) {
    const int64_t bytes = shared_bytes(plan, weight, rows) + 1024;  // a block costs 1 KiB more than it asks for
    const int most = static_cast<int>(std::clamp<int64_t>((device.shared_bytes_per_block + 1024) / bytes, 1, 2));
    const int64_t tiles = tiles_of(plan, weight, rows);
    for (int blocks_each = most; blocks_each >= 1; --blocks_each) {
        const int64_t blocks = int64_t{device.multiprocessors} * blocks_each;
        if (10 * tiles >= 9 * blocks * ceil_div(tiles, blocks)) {
            plan.blocks = static_cast<int>(std::min(blocks, tiles));
            plan.whole_tiles = true;
            return;
        }
    }
    // Less than a stage for each slice is not worth a block, and the last block of a shared tile reads the sums of all.
    const int64_t useful =
        std::max<int64_t>(1, std::min(tiles * stages_of(weight) / plan.slices, kMostSharing * tiles));
    plan.blocks = static_cast<int>(std::min<int64_t>({int64_t{device.multiprocessors} * most, useful, kMostCounters}));
    plan.whole_tiles = false;
}

}  // namespace

bool linear_takes(const PackedWeight& weight) { return weight.groups == 1 || weight.group_size % kUnitColumns == 0; }

const char* plan_linear(const PackedWeight& weight, int64_t rows, LinearPlan& plan) {
    DeviceProperties device;
    if (const char* error = device_properties(device)) return error;
    if (!choose_tile(weight, rows, device, plan)) {
        return "this GPU has too little shared memory";
    }
    choose_blocks(weight, rows, device, plan);
    return nullptr;
}

bool is_possible(const LinearPlan& plan, int bits) {
    if (plan.warpgroups) {
        DeviceProperties device{};
        return !device_properties(device) && takes_warpgroups(device, bits) && plan.row_tiles == kWarpgroupRowTiles &&
               plan.warps_across == kWarpgroupWarps && plan.slices == 1 && plan.blocks >= 1 &&
               plan.blocks <= kMostCounters;
    }
    return has_kernel(bits, plan.row_tiles) && plan.warps_across >= 1 && plan.slices >= 1 &&
           plan.warps_across * plan.slices * 32 <= max_threads(plan.row_tiles) && plan.blocks >= 1 &&
           plan.blocks <= kMostCounters;
}

int64_t linear_workspace(const LinearPlan& plan, const PackedWeight& weight, int64_t rows) {
    return shared_tiles_bytes(plan) +
           (plan.warpgroups ? arranged_bytes(row_parts_of(plan, rows), stages_of(weight)) : 0);
}

const char* linear(const LinearProblem& problem, const LinearPlan& plan, void* workspace, uint32_t* counters,
                   void* stream) {
    const PackedWeight& weight = problem.weight;
    const int64_t tiles = tiles_of(plan, weight, problem.rows);
    const int stages = stages_of(weight);
    // Stages and outputs are counted in 32 bits.
    constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
    if (tiles * stages > kMost || problem.rows > kMost || weight.out_features > kMost || problem.columns > kMost) {
        return "the product is too large for one launch";
    }
    LinearArguments a{};
    a.codes = weight.codes;
    a.scales = weight.scales;
    a.zeros = weight.zeros;
    a.input = static_cast<const uint16_t*>(problem.input);
    a.bias = static_cast<const uint16_t*>(problem.bias);
    a.out = static_cast<uint16_t*>(problem.out);
    a.partial_sums = static_cast<float4*>(workspace);
    a.counters = counters;
    a.rows = static_cast<int>(problem.rows);
    a.columns = static_cast<int>(problem.columns);
    a.units = static_cast<int>(weight.units);
    a.row_blocks = static_cast<int>(weight.row_blocks);
    a.out_features = static_cast<int>(weight.out_features);
    a.groups = static_cast<int>(weight.groups);
    const uint64_t units_per_group = weight.units / weight.groups;
    a.groups_per_unit = ((uint64_t{1} << 32) + units_per_group - 1) / units_per_group;
    a.stages = stages;
    a.row_parts = row_parts_of(plan, problem.rows);
    a.tiles = static_cast<int>(tiles);
    a.quantum = plan.whole_tiles ? stages : 1;
    const int64_t quanta = tiles * stages / a.quantum;
    const int64_t blocks = std::min<int64_t>(plan.blocks, quanta);
    a.each = static_cast<int>(quanta / blocks);
    a.longer = static_cast<int>(quanta % blocks);
    a.warps_across = plan.warps_across;
    a.slices = plan.slices;
    a.input_rows = input_rows_of(plan, problem.rows);
    a.early_stages = problem.overlaps ? kStages - 1 : 0;

    const LaunchShape shape{{static_cast<unsigned>(blocks)},
                            {static_cast<unsigned>(plan.warps_across * plan.slices * 32)},
                            static_cast<size_t>(shared_bytes(plan, weight, problem.rows))};
    if (plan.warpgroups) {
        void* arranged = static_cast<unsigned char*>(workspace) + shared_tiles_bytes(plan);
        return launch_warpgroups(a, problem.dtype, arranged, shape, stream);
    }
    return problem.dtype == Float::kBFloat16 ? launch_linear<BFloat16>(a, weight.bits, plan.row_tiles, shape, stream)
                                             : launch_linear<Half>(a, weight.bits, plan.row_tiles, shape, stream);
}

}  // namespace autoq::cuda
