// Hopper's kernel behind linear.h, for more rows than the memory keeps the tensor cores waiting with: 4 bits, 64 rows
// at a time. Four warps multiply together, from shared memory, what in linear_kernel.h each lane fetches and each warp
// multiplies for itself; and the copy engine brings a stage by a few bulk copies. Tiles, fragments, sums and stores are
// the same.
//
// The weight's fragments come from registers, as there. The input's come from shared memory, from pieces of 8 rows x 8
// columns that must be in the order in which a word's codes become pairs: `arrange` (warpgroup.cu) has put them so,
// column 4j + i of a unit at 8i + j:
//
//   arranged  [64 rows][stage][unit][i][row][j]      i < 4: the pieces of a unit, of which a product takes two
//                                                    j < 8: 16 bytes of a row
//
// so that a stage is 16 KB on end. What is missing at the end, of rows or columns, is zero there.
#pragma once

#include "hopper.h"
#include "linear_launch.h"

namespace autoq::cuda {

constexpr int kArrangedRows = kWarpgroupRowTiles * kTileRows;
constexpr int kPieceBytes = kArrangedRows * 16;  // 8 columns
constexpr int kUnitPieces = kUnitColumns / 8;
constexpr int kArrangedBytes = kStageUnits * kUnitPieces * kPieceBytes;  // of a stage
constexpr int kBlockUnitBytes = kWarpgroupBits * kLanes * 4;             // of a unit of 16 outputs

// Starts the copies of a stage; a lane starts one at most.
class BulkLoader {
  public:
    __device__ __forceinline__ BulkLoader(const LinearArguments& a, const Place& place, int begin, int end,
                                          const SharedParts& parts)
        : a_(a),
          place_(place),
          buffers_(shared_address(parts.stages)),
          barriers_(shared_address(parts.flags + 16)),
          policy_(read_policy(a.row_parts == 1)),  // other parts read the same weights
          walk_(a, place, begin, end) {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < kStages; ++i) barrier_init(barriers_ + i * 8, kWarpgroupWarps);
            publish_barriers();
        }
        sync_threads();
        start_tile();
    }

    // The first stages, all but one of those that there is room for.
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int i = 0; i < kStages - 1; ++i) next();
    }

    // The next stage, into the buffer behind the last one.
    __device__ __forceinline__ void next() {
        if (!walk_.is_done()) {
            load(buffers_ + buffer_ * a_.stage_bytes(kWarpgroupBits), barriers_ + buffer_ * 8);
            if (walk_.advance(a_)) start_tile();
        }
        buffer_ = (buffer_ + 1) % kStages;
    }

    // Until the oldest stage is there that was not waited for, and nobody reads the buffer that is loaded next.
    __device__ __forceinline__ void wait() {
        barrier_wait(barriers_ + waited_ % kStages * 8, waited_ / kStages % 2);
        ++waited_;
        sync_threads();
    }

  private:
    // Lanes 0 .. 15 take the parameters of up to four groups, of both blocks, scales and zeros; 16 and 17 the blocks'
    // weights; 18, of the first warp, the input.
    __device__ __forceinline__ int half() const { return place_.lane < 16 ? place_.lane / 2 % 2 : place_.lane - 16; }
    __device__ __forceinline__ bool is_scale() const { return place_.lane % 2 == 0; }

    __device__ __forceinline__ void start_tile() {
        const Tile tile(a_, walk_.tile, place_, kArrangedRows);
        const int64_t block = min(tile.first_block + half(), a_.row_blocks - 1);
        if (place_.lane < 16) {
            from_ = is_scale() ? reinterpret_cast<const unsigned char*>(a_.scales + block * a_.groups * kLanes)
                               : a_.zeros + block * a_.groups * kLanes;
        } else if (place_.lane < 18) {
            from_ = reinterpret_cast<const unsigned char*>(a_.codes) + block * a_.units * kBlockUnitBytes;
        } else {
            const int64_t part = tile.first_row / kArrangedRows;
            from_ = reinterpret_cast<const unsigned char*>(a_.input) + part * a_.stages * kArrangedBytes;
        }
    }

    __device__ __forceinline__ void load(SharedAddress buffer, SharedAddress barrier) const {
        const int first = walk_.stage * kStageUnits;
        const int units = min(a_.units - first, kStageUnits);
        const int first_group = a_.group_of(first);
        const int groups = a_.group_of(first + units - 1) - first_group + 1;
        const bool takes_input = place_.across == 0;
        if (place_.lane == 0) {
            barrier_expect(barrier, groups * kSlotBytes + 2 * units * kBlockUnitBytes + takes_input * kArrangedBytes);
        }
        sync_warp();
        const SharedAddress parameters = buffer + a_.weight_bytes(kWarpgroupBits);
        if (place_.lane < 16) {
            const int slot = place_.lane / 4, bytes = is_scale() ? 2 * kLanes : kLanes;
            if (slot < groups) {
                const int at = is_scale() ? half() * 2 * kLanes : 2 * kWarpOutputs + half() * kLanes;
                copy_bulk(parameters + place_.across * kParameterBytes + slot * kSlotBytes + at,
                          from_ + static_cast<int64_t>(first_group + slot) * bytes, bytes, barrier);
            }
        } else if (place_.lane < 18) {
            copy_bulk_under(buffer + (place_.across * 2 + half()) * kStageUnits * kBlockUnitBytes,
                            from_ + static_cast<int64_t>(first) * kBlockUnitBytes, units * kBlockUnitBytes, barrier,
                            policy_);
        } else if (place_.lane == 18 && takes_input) {
            copy_bulk(parameters + kWarpgroupWarps * kParameterBytes,
                      from_ + static_cast<int64_t>(walk_.stage) * kArrangedBytes, kArrangedBytes, barrier);
        }
        sync_warp();  // what follows is for whole warps
    }

    const LinearArguments& a_;
    const Place& place_;
    SharedAddress buffers_, barriers_;
    uint64_t policy_;
    Walk walk_;
    unsigned buffer_ = 0, waited_ = 0;
    const unsigned char* from_;  // what the lane copies, at the beginning of the tile
};

template <typename T>
struct WarpgroupMultiplier {
    static constexpr int kTiles = kWarpgroupRowTiles;

    const Place& place;
    const unsigned char* weights;
    const unsigned char* parameters;
    SharedAddress input;
    float sum[2][kTiles][4];

    __device__ __forceinline__ void start_stage(const LinearArguments& a, unsigned char* buffer, int /*rows*/) {
        weights = buffer + place.across * 2 * kStageUnits * kBlockUnitBytes;
        parameters = buffer + a.weight_bytes(kWarpgroupBits) + place.across * kParameterBytes;
        input = shared_address(buffer + a.weight_bytes(kWarpgroupBits) + kWarpgroupWarps * kParameterBytes);
    }

    // Units [first, first + kCount) of the stage, which belong to one group, whose parameters are in the slot.
    template <int kCount>
    __device__ __forceinline__ void multiply_group(int first, int slot) {
        const Group<T, kWarpgroupBits> group(parameters + slot * kSlotBytes, place);
        float partial[2][kTiles][4];  // the first product does not add to it
        uint32_t row[2][4][4];        // of a unit, while the unit before is multiplied
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i >= 2) warpgroup_wait<1>();
            decode_unit(first + i, group.zero, row[i % 2]);
            if (i == 0) pin_sums(partial);
            warpgroup_begin();
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const SharedMatrix matrix(input + ((first + i) * kUnitPieces + 2 * step) * kPieceBytes, kPieceBytes,
                                          kTileRows * 16);
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const auto& upper = row[i % 2][2 * pair];
                    const auto& lower = row[i % 2][2 * pair + 1];
                    const uint32_t a[4] = {upper[2 * step], lower[2 * step], upper[2 * step + 1], lower[2 * step + 1]};
                    warpgroup_multiply<T>(partial[pair], a, matrix, i > 0 || step > 0);
                }
            }
            warpgroup_commit();
        }
        warpgroup_wait<0>();
        pin_sums(partial);
        group.add(sum, partial);
    }

  private:
    __device__ __forceinline__ void decode_unit(int unit, const Zero<T, kWarpgroupBits> (&zero)[4],
                                                uint32_t (&row)[4][4]) const {
        const int block = place.group / 4, rows = place.group % 4;
        const uint4 word = *reinterpret_cast<const uint4*>(weights + (block * kStageUnits + unit) * kBlockUnitBytes +
                                                           place.member * kLanes * 4 + rows * 16);
        decode_row<T, kWarpgroupBits>(word.x, 0, place.member, zero[0], row[0]);
        decode_row<T, kWarpgroupBits>(word.y, 0, place.member, zero[1], row[1]);
        decode_row<T, kWarpgroupBits>(word.z, 0, place.member, zero[2], row[2]);
        decode_row<T, kWarpgroupBits>(word.w, 0, place.member, zero[3], row[3]);
#pragma unroll
        for (int i = 0; i < 16; ++i) pin(row[i / 4][i % 4]);
    }

    __device__ static __forceinline__ void pin_sums(float (&partial)[2][kTiles][4]) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles * 4; ++i) pin(partial[i / (kTiles * 4)][i / 4 % kTiles][i % 4]);
    }
};

template <typename T>
__global__ void __launch_bounds__(kWarpgroupWarps * 32, 2) warpgroup_kernel(const LinearArguments a) {
    if constexpr (kTakesWarpgroups) {
        const Place place(kWarpgroupWarps);
        const int begin = a.first_stage(blockIdx.x), end = a.first_stage(blockIdx.x + 1);
        const int stage_bytes = a.stage_bytes(kWarpgroupBits);
        const SharedParts parts(a, place, stage_bytes);
        BulkLoader loader(a, place, begin, end, parts);
        WarpgroupMultiplier<T> multiplier{place};
        make_tiles<T, kWarpgroupRowTiles>(a, place, parts, stage_bytes, begin, end, loader, multiplier);
    } else {
        trap();  // code for another architecture was chosen
    }
}

}  // namespace autoq::cuda
