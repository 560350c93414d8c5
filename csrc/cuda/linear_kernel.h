// The kernel behind linear.h. The weight is the left operand of the tensor cores' 16 x 8 x 16 product and the input the
// right one, so that few rows waste little: outputs run along the 16, rows of the input along the 8.
//
// How the packed layout (layout.h) meets the fragments. A warp makes 32 outputs, two blocks of 16. Lane 4g + t takes of
// each unit the 16 bytes that hold rows 4(g % 4) .. + 3 of block g / 4, at the columns 8t .. 8t + 7:
//
//                      t = 0           t = 1           t = 2           t = 3          (4 bits: word t of the unit)
//   block 0, rows 0-3  | lane 0        | lane 1        | lane 2        | lane 3
//            rows 4-7  | lane 4        | lane 5        | ...
//   ...
//   block 1, rows 0-3  | lane 16       | lane 17       | ...
//
// A product's 16 columns are, of each t, four of the eight: which columns of the weight the hardware calls which is
// free as long as those of the input are called the same, and so are the rows. Row s (0 .. 3) of lane group g is output
// 4g + s; rows 0 and 1 are the fragment's rows g and g + 8 in one product, rows 2 and 3 in a second. The eight columns
// of a word are taken in the pairs (0, 4) (1, 5) (2, 6) (3, 7), because one mask brings bits i and i + 16 of a word.
// The first two pairs are one product's columns, the others the next one's: 16 bytes feed four products. A lane reads
// its columns of the input as 16 bytes too, and has four outputs side by side to store.
//
// Codes become numbers exactly (decode.h), and products are summed for a group of columns before they are scaled in
// fp32: no weight is ever rounded.
#pragma once

#include "linear_launch.h"
#include "overlap.h"

namespace autoq::cuda {

// ---- loading --------------------------------------------------------------------------------------------------------

// Starts the copies of a warp's part of a stage: its weights and their parameters, and its share of the input, which
// the warps of a slice have in common. Goes through the slice's stages, of one tile after the other; what can be worked
// out once for a tile is. Outputs behind the last block are read from the last one, and never stored.
template <int kBits, int kTiles>
class Loader {
  public:
    __device__ __forceinline__ Loader(const LinearArguments& a, const Place& place, int begin, int end,
                                      unsigned char* buffers)
        : a_(a),
          place_(place),
          buffers_(shared_address(buffers)),
          policy_(read_policy(a.row_parts == 1)),  // other parts read the same weights
          walk_(a, place, begin, end) {
        start_tile();
    }

    // The slice's first stages, all but one of those that there is room for. Here the kernel waits for those before it:
    // nothing but the weight may be touched until then.
    __device__ __forceinline__ void begin() {
        const Walk first = walk_;
        const int early_stages = kOverlaps ? a_.early_stages : 0;
#pragma unroll 1
        for (int i = 0; i < early_stages; ++i) advance([&](SharedAddress buffer) { load_weight(buffer); });
        walk_ = first;
        buffer_ = 0;
        start_tile();
        wait_for_earlier_kernels();
        let_the_next_kernel_start();
#pragma unroll 1
        for (int i = 0; i < kStages - 1; ++i) {
            advance([&](SharedAddress buffer) {
                if (i >= early_stages) load_weight(buffer);
                load_input(buffer);
            });
            copy_async_commit();
        }
    }

    // The slice's next stage.
    __device__ __forceinline__ void next() {
        advance([&](SharedAddress buffer) {
            load_weight(buffer);
            load_input(buffer);
        });
        copy_async_commit();
    }

    // Until the oldest stage is there that was not waited for, of all warps of the slice, and nobody reads the buffer
    // that is loaded next.
    __device__ __forceinline__ void wait() const {
        copy_async_wait<kStages - 2>();
        if (a_.warps_across > 1) {
            sync_barrier(1 + place_.slice, a_.warps_across * 32);
        } else {
            sync_warp();
        }
    }

  private:
    // Chunks of 16 bytes lie in shared memory as [unit][lane group][word], 32 * kBits of them, and each lane copies
    // every 32nd. The lane's part of a unit repeats itself after so many of its chunks, and then so many units.
    static constexpr int kPatterns = kBits == 8 ? 2 : kBits == 3 ? 3 : 1;
    static constexpr int kPatternUnits = kPatterns * 4 / kBits;
    static constexpr int kUnitWords = kBits * kLanes;

    __device__ __forceinline__ void start_tile() {
        const Tile tile(a_, walk_.tile, place_, kTiles * kTileRows);
        const int last_block = a_.row_blocks - 1;
#pragma unroll
        for (int i = 0; i < kPatterns; ++i) {
            const int chunk = i * 32 + place_.lane;
            const int unit = chunk / (8 * kBits), group = chunk / kBits % 8, word = chunk % kBits;
            const int64_t block = min(tile.first_block + group / 4, last_block);
            codes_[i] = a_.codes + ((block * a_.units + unit) * kBits + word) * kLanes + group % 4 * 4;
        }
        // Six lanes take a group's parameters: of both blocks, the scales in two pieces and the zeros in one.
        const int half = place_.lane % 6 / 3, piece = place_.lane % 3;
        const int64_t parameters = static_cast<int64_t>(min(tile.first_block + half, last_block)) * a_.groups * kLanes;
        parameters_ = piece < 2 ? reinterpret_cast<const unsigned char*>(a_.scales + parameters) + piece * 16
                                : a_.zeros + parameters;
        input_ = a_.input + static_cast<int64_t>(tile.first_row + input_row()) * a_.columns + input_chunk() * 8;
        rows_ = tile.rows;
    }

    __device__ __forceinline__ int input_row() const { return (place_.across * 32 + place_.lane) / 16; }
    __device__ __forceinline__ int input_chunk() const { return place_.lane % 16; }

    // Past a stage, of which `load` starts copies into the buffer behind the last one's.
    template <typename Load>
    __device__ __forceinline__ void advance(const Load& load) {
        if (!walk_.is_done()) {
            load(buffers_ + buffer_ * a_.stage_bytes(kBits));
            if (walk_.advance(a_)) start_tile();
        }
        buffer_ = (buffer_ + 1) % kStages;
    }

    // The codes and their parameters.
    __device__ __forceinline__ void load_weight(SharedAddress buffer) const {
        const int first = walk_.stage * kStageUnits;
        const int units = min(a_.units - first, kStageUnits);
        load_codes(buffer + place_.across * (kStageUnits * kBits * 8 * 16), first, units);
        load_parameters(buffer + a_.weight_bytes(kBits) + place_.across * kParameterBytes, a_.group_of(first),
                        a_.group_of(first + units - 1));
    }

    __device__ __forceinline__ void load_codes(SharedAddress to, int first, int units) const {
        const uint32_t* from[kPatterns];
#pragma unroll
        for (int i = 0; i < kPatterns; ++i) from[i] = codes_[i] + static_cast<int64_t>(first) * kUnitWords;
        const bool is_whole = units == kStageUnits;
        to = to + place_.lane * 16;
#pragma unroll
        for (int i = 0; i < kBits; ++i) {
            const int chunk_unit = (i * 32 + place_.lane) / (8 * kBits);
            const uint32_t* chunk = from[i % kPatterns] + i / kPatterns * kPatternUnits * kUnitWords;
            if (is_whole || chunk_unit < units) copy_async_16_under(to + i * 512, chunk, policy_);
        }
    }

    __device__ __forceinline__ void load_parameters(SharedAddress to, int first_group, int last_group) const {
        const int slot = place_.lane / 6, half = place_.lane % 6 / 3, piece = place_.lane % 3;
        const int group = first_group + slot;
        if (slot < kStageUnits && group <= last_group) {
            copy_async_16(to + slot * kSlotBytes + (piece < 2 ? half * 32 + piece * 16 : 64 + half * 16),
                          parameters_ + static_cast<int64_t>(group) * (piece < 2 ? 2 * kLanes : kLanes));
        }
    }

    __device__ __forceinline__ void load_input(SharedAddress buffer) const {
        // Chunks of odd rows trade places, so that lanes of two rows read from different banks.
        const int step = a_.warps_across * 2, first_column = walk_.stage * kStageColumns;
        const bool inside = first_column + input_chunk() * 8 < a_.columns;
        const uint16_t* from = input_ + (inside ? first_column : 0);
        SharedAddress to = buffer + a_.weight_bytes(kBits) + a_.warps_across * kParameterBytes;
        to = to + input_row() * kInputRowBytes + (input_chunk() ^ (input_row() % 2 * 4)) * 16;
#pragma unroll 1
        for (int row = input_row(); row < rows_; row += step) {
            copy_async_16(to, from, inside);
            to = to + step * kInputRowBytes;
            from += static_cast<int64_t>(step) * a_.columns;
        }
    }

    const LinearArguments& a_;
    const Place& place_;
    SharedAddress buffers_;
    uint64_t policy_;
    Walk walk_;
    unsigned buffer_ = 0;
    const uint32_t* codes_[kPatterns];
    const unsigned char* parameters_;
    const uint16_t* input_;
    int rows_;
};

// ---- multiplying ----------------------------------------------------------------------------------------------------

template <typename T, int kBits, int kTiles>
struct Multiplier {
    const Place& place;
    const unsigned char* weights;
    const unsigned char* parameters;
    const unsigned char* input;
    int last_row;
    float sum[2][kTiles][4];  // the fragments of two products for each eight rows

    __device__ __forceinline__ void start_stage(const LinearArguments& a, const unsigned char* buffer, int rows) {
        weights = buffer + place.across * (kStageUnits * kBits * 8 * 16);
        parameters = buffer + a.weight_bytes(kBits) + place.across * kParameterBytes;
        input = buffer + a.weight_bytes(kBits) + a.warps_across * kParameterBytes;
        last_row = rows - 1;
    }

    // Units [first, first + kCount) of the stage, which belong to one group, whose parameters are in the slot.
    template <int kCount>
    __device__ __forceinline__ void multiply_group(int first, int slot) {
        const Group<T, kBits> group(parameters + slot * kSlotBytes, place);
        float partial[2][kTiles][4];
        clear_sums(partial);
        // Unrolled, the sums of 64 rows would not leave enough registers.
#pragma unroll(kTiles < 8 ? kCount : 1)
        for (int i = 0; i < kCount; ++i) multiply_unit(first + i, group.zero, partial);
        group.add(sum, partial);
    }

  private:
    // The lane's four rows of one of the unit's words.
    __device__ __forceinline__ uint4 word(int unit, int index) const {
        return *reinterpret_cast<const uint4*>(weights + ((unit * 8 + place.group) * kBits + index) * 16);
    }

    __device__ __forceinline__ void multiply_unit(int unit, const Zero<T, kBits> (&zero)[4],
                                                  float (&partial)[2][kTiles][4]) const {
        const int t = place.member;
        const uint4 low = word(unit, kBits == 8 ? 2 * t : kBits == 4 ? t : t / 2);
        uint4 high = make_uint4(0, 0, 0, 0);
        if constexpr (kBits == 8) high = word(unit, 2 * t + 1);
        if constexpr (kBits == 3) high = word(unit, 2);
        uint32_t row[4][4];
        decode_row<T, kBits>(low.x, high.x, t, zero[0], row[0]);
        decode_row<T, kBits>(low.y, high.y, t, zero[1], row[1]);
        decode_row<T, kBits>(low.z, high.z, t, zero[2], row[2]);
        decode_row<T, kBits>(low.w, high.w, t, zero[3], row[3]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            // Where there are fewer rows, the last one stands in for the others, whose products are not stored.
            const int n = min(tile * kTileRows + place.group, last_row);
            const int chunk = (unit * 4 + t) ^ (n % 2 * 4);
            const uint4 x = *reinterpret_cast<const uint4*>(input + n * kInputRowBytes + chunk * 16);
            uint32_t pairs[4];
            pair_columns(x, pairs);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const uint32_t a[4] = {row[2 * pair][2 * step], row[2 * pair + 1][2 * step],
                                           row[2 * pair][2 * step + 1], row[2 * pair + 1][2 * step + 1]};
                    mma_m16n8k16<T>(partial[pair][tile], a, pairs[2 * step], pairs[2 * step + 1]);
                }
            }
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int kBits, int kTiles>
__global__ void __launch_bounds__(max_threads(kTiles)) linear_kernel(const LinearArguments a) {
    const Place place(a.warps_across);
    const int begin = a.first_stage(blockIdx.x), end = a.first_stage(blockIdx.x + 1);
    const int stage_bytes = a.stage_bytes(kBits);
    const SharedParts parts(a, place, stage_bytes);
    Loader<kBits, kTiles> loader(a, place, begin, end, parts.stages);
    Multiplier<T, kBits, kTiles> multiplier{place};
    make_tiles<T, kTiles>(a, place, parts, stage_bytes, begin, end, loader, multiplier);
}

template <typename T, int kBits>
const char* launch_linear_tiles(const LinearArguments& arguments, int row_tiles, const LaunchShape& shape,
                                void* stream) {
    const auto start = [&](auto kernel) {
        return arguments.early_stages ? launch_overlapping(kernel, shape, stream, arguments)
                                      : launch(kernel, shape, stream, arguments);
    };
    if (row_tiles == 1) return start(linear_kernel<T, kBits, 1>);
    if (row_tiles == 4) return start(linear_kernel<T, kBits, 4>);
    if constexpr (has_kernel(kBits, 2)) {
        if (row_tiles == 2) return start(linear_kernel<T, kBits, 2>);
        if (row_tiles == 8) return start(linear_kernel<T, kBits, 8>);
    }
    return "there is no kernel for these bits and rows";
}

template <typename T>
const char* launch_linear_bits(const LinearArguments& arguments, int bits, int row_tiles, const LaunchShape& shape,
                               void* stream) {
    switch (bits) {
        case 2:
            return launch_linear_tiles<T, 2>(arguments, row_tiles, shape, stream);
        case 3:
            return launch_linear_tiles<T, 3>(arguments, row_tiles, shape, stream);
        case 4:
            return launch_linear_tiles<T, 4>(arguments, row_tiles, shape, stream);
        default:
            return launch_linear_tiles<T, 8>(arguments, row_tiles, shape, stream);
    }
}

}  // namespace autoq::cuda
