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
// Codes become numbers exactly: or-ed into the mantissa of a power of two, from which the zero point is then taken
// away. Products are summed for a group of columns, then scaled in fp32: no weight is ever rounded.
#pragma once

#include "device.h"
#include "linear.h"

namespace autoq::cuda {

constexpr int kStageUnits = 4;  // units in a stage
constexpr int kStageColumns = kStageUnits * kUnitColumns;
constexpr int kStages = 4;  // stages in shared memory, of which one is multiplied while the others arrive
constexpr int kWarpOutputs = 2 * kLanes;
constexpr int kTileRows = 8;  // rows of the input in one product
constexpr int kInputRowBytes = kStageColumns * 2;
constexpr int kSlotBytes = 3 * kWarpOutputs;  // scales and zeros of one group, for the outputs of a warp
constexpr int kParameterBytes = kStageUnits * kSlotBytes;

struct LinearArguments {
    const uint32_t* codes;
    const uint16_t* scales;
    const uint8_t* zeros;
    const uint16_t* input;
    const uint16_t* bias;
    uint16_t* out;
    float4* partial_sums;
    uint32_t* counters;
    int rows, columns, units, row_blocks, out_features, groups;
    uint64_t groups_per_unit;  // times 2^32, rounded up
    int stages;                // of a tile
    int row_parts;             // tiles that share their outputs
    int tiles;
    // The stages of all tiles, in quanta between which they may be divided: every block has `each` or, the first
    // `longer` ones, one more.
    int quantum, each, longer;
    int warps_across, slices;
    int input_rows;  // rows of a tile that shared memory has room for

    // Exact while units times units in a group are less than 2^32.
    AUTOQ_HOST_DEVICE int group_of(int unit) const {
        return static_cast<int>((static_cast<uint64_t>(unit) * groups_per_unit) >> 32);
    }
    // The first stage of a block, counted over all tiles.
    AUTOQ_HOST_DEVICE int first_stage(int block) const {
        return (block * each + (block < longer ? block : longer)) * quantum;
    }
    // The block that has a stage.
    AUTOQ_HOST_DEVICE int block_of(int stage) const {
        const int at = stage / quantum;
        return at < longer * (each + 1) ? at / (each + 1) : (at - longer) / each;
    }
    AUTOQ_HOST_DEVICE int weight_bytes(int bits) const { return warps_across * kStageUnits * bits * 8 * 16; }
    AUTOQ_HOST_DEVICE int stage_bytes(int bits) const {
        return weight_bytes(bits) + warps_across * kParameterBytes + input_rows * kInputRowBytes;
    }
};

// ---- codes to numbers -----------------------------------------------------------------------------------------------

// Powers of two whose last mantissa bit is worth 1, as pairs; and their negatives, into which zero points are or-ed.
template <typename T>
constexpr uint32_t kMagic = std::is_same_v<T, Half> ? 0x64006400u : 0x43004300u;  // 1024, 128
template <typename T>
constexpr uint32_t kNegativeMagic = kMagic<T> | 0x80008000u;
template <typename T>
constexpr uint32_t kOne = std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;

// bf16 has no room for 8 bits beside its leading one.
template <typename T, int kBits>
constexpr bool kThroughFloat = std::is_same_v<T, BFloat16> && kBits == 8;

// The zero point of a row, in the form that `decode_row` subtracts. Zero points of up to 63 are exact.
template <typename T, int kBits>
struct Zero {
    uint32_t pair;       // -(magic + zero)
    uint32_t high_pair;  // fp16, 4 bits: -(64 + zero), for codes that stand four bits higher
    float value;         // magic + zero, where bf16 is made through fp32

    __device__ __forceinline__ void set(uint32_t zeros, int row) {
        const uint32_t twice = permute_bytes(zeros, 0, 0x4040 + 0x0101 * row);  // the byte in both halves
        if constexpr (kThroughFloat<T, kBits>) {
            value = 8388608.0f + static_cast<float>(twice & 0xff);
        } else {
            pair = twice | kNegativeMagic<T>;
            if constexpr (std::is_same_v<T, Half> && kBits == 4) high_pair = twice << 4 | 0xd400d400u;
        }
    }
};

// 2^23 + byte `i` of a word, less the zero.
__device__ __forceinline__ float byte_to_float(uint32_t word, int i, float zero) {
    union {
        uint32_t bits;
        float value;
    } number{permute_bytes(word, 0x4b000000u, 0x7440 + i)};
    return number.value - zero;
}

// Eight columns of a row, code minus zero, as the pairs (0, 4) (1, 5) (2, 6) (3, 7). `low` and `high` are the lane's
// words of the row, of which 2 and 4 bits need only the first; t is the lane's place among the columns.
template <typename T, int kBits>
__device__ __forceinline__ void decode_row(uint32_t low, uint32_t high, int t, const Zero<T, kBits>& zero,
                                           uint32_t (&pairs)[4]) {
    if constexpr (kThroughFloat<T, kBits>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = pair_from_floats<T>(byte_to_float(low, i, zero.value), byte_to_float(high, i, zero.value));
        }
    } else if constexpr (kBits == 8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bytes = permute_bytes(low, high, 0x0400 + 0x0101 * i);
            pairs[i] = fma_pairs<T>(and_or(bytes, 0x00ff00ffu, kMagic<T>), kOne<T>, zero.pair);
        }
    } else if constexpr (kBits == 4 && std::is_same_v<T, Half>) {
        // A code four bits higher counts 16 times; a sixteenth of 1024 is 64. One shift instead of three.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = i < 2 ? low : low >> 8;
            const uint32_t magic = and_or(word, i % 2 ? 0x00f000f0u : 0x000f000fu, kMagic<T>);
            constexpr uint32_t kSixteenth = 0x2c002c00u;
            pairs[i] = fma_pairs<T>(magic, i % 2 ? kSixteenth : kOne<T>, i % 2 ? zero.high_pair : zero.pair);
        }
    } else if constexpr (kBits == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = fma_pairs<T>(and_or(low >> (4 * i), 0x000f000fu, kMagic<T>), kOne<T>, zero.pair);
        }
    } else {
        // Two bytes of a word, spread so that columns i and i + 4 stand 16 bits apart.
        const auto spread = [&](uint32_t word) { return permute_bytes(word, 0u, t % 2 == 0 ? 0x4140 : 0x4342); };
        const uint32_t own = spread(low);
        uint32_t codes[4];
        if constexpr (kBits == 3) {
            const uint32_t shared = spread(high) >> (t / 2 * 4);
            codes[0] = and_or(own, 0x00070007u, kMagic<T>);
            codes[1] = and_or(own >> 3, 0x00070007u, kMagic<T>);
            codes[2] = and_or(shared, 0x00070007u, kMagic<T>);
            codes[3] = and_or(shared >> 1, 0x00040004u, and_or(own >> 6, 0x00030003u, kMagic<T>));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) codes[i] = and_or(own >> (2 * i), 0x00030003u, kMagic<T>);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = fma_pairs<T>(codes[i], kOne<T>, zero.pair);
    }
}

// ---- a thread's place -----------------------------------------------------------------------------------------------

struct Place {
    int lane, group, member;  // lane = 4 * group + member
    int across, slice;        // of the warp

    __device__ __forceinline__ explicit Place(int warps_across)
        : lane(threadIdx.x % 32),
          group(lane / 4),
          member(lane % 4),
          across(static_cast<int>(threadIdx.x / 32) % warps_across),
          slice(static_cast<int>(threadIdx.x / 32) / warps_across) {}
};

// What a warp makes of a tile.
struct Tile {
    int first_block;  // of outputs
    int first_row, rows;

    __device__ __forceinline__ Tile(const LinearArguments& a, int index, const Place& place, int most_rows) {
        const int part = index % a.row_parts;
        first_block = (index / a.row_parts * a.warps_across + place.across) * 2;
        first_row = part * most_rows;
        rows = min(a.rows - first_row, most_rows);
    }
};

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
          policy_(read_once_policy()),
          at_(begin + place.slice),
          end_(end),
          index_(at_ / a.stages),
          stage_(at_ % a.stages) {
        start_tile();
    }

    // The slice's next stage, into the buffer behind the last one.
    __device__ __forceinline__ void next() {
        if (at_ < end_) {
            load(buffers_ + buffer_ * a_.stage_bytes(kBits));
            advance();
        }
        copy_async_commit();
        buffer_ = (buffer_ + 1) % kStages;
    }

  private:
    // Chunks of 16 bytes lie in shared memory as [unit][lane group][word], 32 * kBits of them, and each lane copies
    // every 32nd. The lane's part of a unit repeats itself after so many of its chunks, and then so many units.
    static constexpr int kPatterns = kBits == 8 ? 2 : kBits == 3 ? 3 : 1;
    static constexpr int kPatternUnits = kPatterns * 4 / kBits;
    static constexpr int kUnitWords = kBits * kLanes;

    __device__ __forceinline__ void advance() {
        at_ += a_.slices;
        stage_ += a_.slices;
        if (stage_ >= a_.stages) {
            for (; stage_ >= a_.stages; ++index_) stage_ -= a_.stages;
            start_tile();
        }
    }

    __device__ __forceinline__ void start_tile() {
        const Tile tile(a_, index_, place_, kTiles * kTileRows);
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

    __device__ __forceinline__ void load(SharedAddress buffer) const {
        const int first = stage_ * kStageUnits;
        const SharedAddress parameters = buffer + a_.weight_bytes(kBits);
        const int units = min(a_.units - first, kStageUnits);
        load_weights(buffer + place_.across * (kStageUnits * kBits * 8 * 16), first, units);
        load_parameters(parameters + place_.across * kParameterBytes, a_.group_of(first),
                        a_.group_of(first + units - 1));
        load_input(parameters + a_.warps_across * kParameterBytes, first * kUnitColumns);
    }

    __device__ __forceinline__ void load_weights(SharedAddress to, int first, int units) const {
        const uint32_t* from[kPatterns];
#pragma unroll
        for (int i = 0; i < kPatterns; ++i) from[i] = codes_[i] + static_cast<int64_t>(first) * kUnitWords;
        const bool is_whole = units == kStageUnits;
        to = to + place_.lane * 16;
#pragma unroll
        for (int i = 0; i < kBits; ++i) {
            const int chunk_unit = (i * 32 + place_.lane) / (8 * kBits);
            const uint32_t* chunk = from[i % kPatterns] + i / kPatterns * kPatternUnits * kUnitWords;
            if (is_whole || chunk_unit < units) copy_async_16_once(to + i * 512, chunk, policy_);
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

    __device__ __forceinline__ void load_input(SharedAddress to, int first_column) const {
        // Chunks of odd rows trade places, so that lanes of two rows read from different banks.
        const int step = a_.warps_across * 2;
        const bool inside = first_column + input_chunk() * 8 < a_.columns;
        const uint16_t* from = input_ + (inside ? first_column : 0);
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
    int at_, end_, index_, stage_;
    unsigned buffer_ = 0;
    const uint32_t* codes_[kPatterns];
    const unsigned char* parameters_;
    const uint16_t* input_;
    int rows_;
};

// ---- multiplying ----------------------------------------------------------------------------------------------------

template <int kTiles>
__device__ __forceinline__ void clear_sums(float (&sums)[2][kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[pair][tile][i] = 0.0f;
        }
    }
}

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
        const unsigned char* from = parameters + slot * kSlotBytes;
        const uint2 scales = *reinterpret_cast<const uint2*>(from + 8 * place.group);
        const uint32_t zeros = *reinterpret_cast<const uint32_t*>(from + 64 + 4 * place.group);
        Zero<T, kBits> zero[4];
#pragma unroll
        for (int row = 0; row < 4; ++row) zero[row].set(zeros, row);

        float partial[2][kTiles][4];
        clear_sums(partial);
        // Unrolled, the sums of 64 rows would not leave enough registers.
#pragma unroll(kTiles < 8 ? kCount : 1)
        for (int i = 0; i < kCount; ++i) multiply_unit(first + i, zero, partial);

        const float scale[4] = {low_half(scales.x), high_half(scales.x), low_half(scales.y), high_half(scales.y)};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[pair][tile][i] += scale[2 * pair + i / 2] * partial[pair][tile][i];
            }
        }
    }

  private:
    __device__ static __forceinline__ float low_half(uint32_t pair) {
        return to_float(Half{static_cast<uint16_t>(pair)});
    }
    __device__ static __forceinline__ float high_half(uint32_t pair) {
        return to_float(Half{static_cast<uint16_t>(pair >> 16)});
    }

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
            const uint32_t pairs[4] = {permute_bytes(x.x, x.z, 0x5410), permute_bytes(x.x, x.z, 0x7632),
                                       permute_bytes(x.y, x.w, 0x5410), permute_bytes(x.y, x.w, 0x7632)};
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

// ---- adding up and storing ------------------------------------------------------------------------------------------

// A warp's sums are handed on as float4s in the order of its fragments, [fragment][thread].
template <int kTiles>
__device__ __forceinline__ float4 fragment(const float (&sum)[2][kTiles][4], int index) {
    const float (&part)[4] = sum[index / kTiles][index % kTiles];
    return make_float4(part[0], part[1], part[2], part[3]);
}

template <int kTiles>
__device__ __forceinline__ void add_fragment(float (&sum)[2][kTiles][4], int index, const float4& part) {
    sum[index / kTiles][index % kTiles][0] += part.x;
    sum[index / kTiles][index % kTiles][1] += part.y;
    sum[index / kTiles][index % kTiles][2] += part.z;
    sum[index / kTiles][index % kTiles][3] += part.w;
}

// Adds the sums of all slices, in order, to those of the first.
template <int kTiles>
__device__ __forceinline__ void add_slices(const LinearArguments& a, const Place& place, float4* shared,
                                           float (&sum)[2][kTiles][4]) {
    const int threads = a.warps_across * 32, thread = place.across * 32 + place.lane;
    sync_threads();  // the first slice has read what was here for the tile before
    if (place.slice > 0) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
            shared[((place.slice - 1) * 2 * kTiles + i) * threads + thread] = fragment(sum, i);
        }
    }
    sync_threads();
    if (place.slice > 0) return;
#pragma unroll 1
    for (int slice = 0; slice < a.slices - 1; ++slice) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) add_fragment(sum, i, shared[(slice * 2 * kTiles + i) * threads + thread]);
    }
}

// Adds the sums of the blocks that share a tile: each leaves its own in the workspace, and the last to come takes all,
// in the order of the blocks. Returns whether this is the last. Called by the first slice.
template <int kTiles>
__device__ __forceinline__ bool add_blocks(const LinearArguments& a, const Place& place, int tile, int* is_last,
                                           float (&sum)[2][kTiles][4]) {
    const int threads = a.warps_across * 32, thread = place.across * 32 + place.lane;
    const int first = a.block_of(tile * a.stages), last = a.block_of((tile + 1) * a.stages - 1);
    // A block has at most two shared tiles: one that began before it, and one that goes on behind it.
    const auto place_of = [&](unsigned owner) {
        return a.partial_sums +
               static_cast<int64_t>(2 * owner + (owner == static_cast<unsigned>(first))) * 2 * kTiles * threads +
               thread;
    };
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) store_global(place_of(blockIdx.x) + i * threads, fragment(sum, i));
    memory_fence();
    sync_barrier(1, threads);
    if (thread == 0) {
        *is_last = atomic_add(a.counters + first, 1) == static_cast<uint32_t>(last - first);
        if (*is_last) store_global(a.counters + first, 0u);
    }
    sync_barrier(1, threads);
    if (!*is_last) return false;
    memory_fence();
    clear_sums(sum);
    // All of a block's fragments are asked for before the first is waited for, and where these are few, several
    // blocks'.
#pragma unroll(kTiles < 4 ? 4 : 1)
    for (int owner = first; owner <= last; ++owner) {
        float4 parts[2 * kTiles];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) parts[i] = load_written(place_of(owner) + i * threads);
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) add_fragment(sum, i, parts[i]);
    }
    return true;
}

// Four outputs of a row, side by side.
template <typename T>
__device__ __forceinline__ void store_outputs(const LinearArguments& a, int row, int first, float (&values)[4]) {
    uint16_t* to = a.out + static_cast<int64_t>(row) * a.out_features + first;
    if (a.bias) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i < a.out_features) values[i] += to_float(T{load_global(a.bias + first + i)});
        }
    }
    if (a.out_features % 4 == 0) {
        if (first < a.out_features) {
            store_global(reinterpret_cast<uint2*>(to), make_uint2(pair_from_floats<T>(values[0], values[1]),
                                                                  pair_from_floats<T>(values[2], values[3])));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (first + i < a.out_features) store_global(to + i, from_float<T>(values[i]).bits);
    }
}

template <typename T, int kTiles>
__device__ __forceinline__ void store_tile(const LinearArguments& a, const Place& place, const Tile& tile,
                                           const float (&sum)[2][kTiles][4]) {
    const int first = tile.first_block * kLanes + 4 * place.group;
#pragma unroll
    for (int part = 0; part < kTiles; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = part * kTileRows + 2 * place.member + i;
            float values[4] = {sum[0][part][i], sum[0][part][2 + i], sum[1][part][i], sum[1][part][2 + i]};
            if (row < tile.rows) store_outputs<T>(a, tile.first_row + row, first, values);
        }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// The most threads of a block; more registers for more rows.
constexpr int max_threads(int row_tiles) { return row_tiles == 1 ? 512 : 256; }

template <typename T, int kBits, int kTiles>
__global__ void __launch_bounds__(max_threads(kTiles)) linear_kernel(const LinearArguments a) {
    const Place place(a.warps_across);
    const int begin = a.first_stage(blockIdx.x), end = a.first_stage(blockIdx.x + 1);
    const int stage_bytes = a.stage_bytes(kBits);
    unsigned char* buffers = shared_memory() + place.slice * kStages * stage_bytes;
    auto* slice_sums = reinterpret_cast<float4*>(shared_memory() + a.slices * kStages * stage_bytes + 16);
    auto* is_last = reinterpret_cast<int*>(slice_sums) - 4;

    // Stages are loaded up to three ahead of the one that is multiplied, across the border between tiles.
    Loader<kBits, kTiles> loader(a, place, begin, end, buffers);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) loader.next();

    Multiplier<T, kBits, kTiles> multiplier{place};
    const int units_per_group = a.groups == 1 ? kStageUnits : a.units / a.groups;
    unsigned buffer = 0;
    int at = begin + place.slice;
    for (int index = begin / a.stages; index * a.stages < end; ++index) {
        const Tile tile(a, index, place, kTiles * kTileRows);
        clear_sums(multiplier.sum);
        for (; at < min(end, (index + 1) * a.stages); at += a.slices) {
            copy_async_wait<kStages - 2>();
            // What the slice's other warps have loaded is there, and nobody reads the buffer that is loaded next.
            if (a.warps_across > 1) {
                sync_barrier(1 + place.slice, a.warps_across * 32);
            } else {
                sync_warp();
            }
            loader.next();
            multiplier.start_stage(a, buffers + buffer * stage_bytes, tile.rows);
            if (units_per_group % kStageUnits == 0) {
                multiplier.template multiply_group<kStageUnits>(0, 0);
            } else {
                const int first = (at - index * a.stages) * kStageUnits;
#pragma unroll 1
                for (int unit = 0; unit < min(kStageUnits, a.units - first); ++unit) {
                    multiplier.template multiply_group<1>(unit, a.group_of(first + unit) - a.group_of(first));
                }
            }
            buffer = (buffer + 1) % kStages;
        }
        if (a.slices > 1) add_slices(a, place, slice_sums, multiplier.sum);
        if (place.slice > 0) continue;
        const bool is_whole = begin <= index * a.stages && (index + 1) * a.stages <= end;
        if (is_whole || add_blocks(a, place, index, is_last, multiplier.sum)) {
            store_tile<T>(a, place, tile, multiplier.sum);
        }
    }
}

// Launches the kernel for the weight's bits and the plan's row tiles; defined in a file for each dtype, which are
// compiled side by side.
template <typename T>
const char* launch_linear(const LinearArguments& arguments, int bits, int row_tiles, const LaunchShape& shape,
                          void* stream);

// Which kernels there are: 4 bits come in every size, the others, less common, in two.
constexpr bool has_kernel(int bits, int row_tiles) {
    return row_tiles == 1 || row_tiles == 4 || (bits == 4 && (row_tiles == 2 || row_tiles == 8));
}

template <typename T, int kBits>
const char* launch_linear_tiles(const LinearArguments& arguments, int row_tiles, const LaunchShape& shape,
                                void* stream) {
    if (row_tiles == 1) return launch(linear_kernel<T, kBits, 1>, shape, stream, arguments);
    if (row_tiles == 4) return launch(linear_kernel<T, kBits, 4>, shape, stream, arguments);
    if constexpr (has_kernel(kBits, 2)) {
        if (row_tiles == 2) return launch(linear_kernel<T, kBits, 2>, shape, stream, arguments);
        if (row_tiles == 8) return launch(linear_kernel<T, kBits, 8>, shape, stream, arguments);
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
