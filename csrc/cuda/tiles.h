// What a block of threads of a linear kernel makes: tiles of outputs, from stages of columns, whose sums are added up
// and stored. How a stage gets into shared memory and is multiplied is the business of linear_kernel.h and
// warpgroup_kernel.h.
#pragma once

#include "decode.h"
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
constexpr int kFlagBytes = 128;  // beside stages and sums, in shared memory

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
    int input_rows;    // rows of a tile that shared memory has room for
    int early_stages;  // whose weights are loaded before the kernel waits for those before it

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

// A slice's way through the stages of all tiles.
struct Walk {
    int at, end;
    int tile, stage;  // of the tile

    __device__ __forceinline__ Walk(const LinearArguments& a, const Place& place, int begin, int end_)
        : at(begin + place.slice), end(end_), tile(at / a.stages), stage(at % a.stages) {}

    __device__ __forceinline__ bool is_done() const { return at >= end; }

    // Goes to the slice's next stage. Returns whether that is in another tile.
    __device__ __forceinline__ bool advance(const LinearArguments& a) {
        at += a.slices;
        stage += a.slices;
        if (stage < a.stages) return false;
        for (; stage >= a.stages; ++tile) stage -= a.stages;
        return true;
    }
};

// ---- sums ----------------------------------------------------------------------------------------------------

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

// ---- a group's parameters -------------------------------------------------------------------------------------------

// Of a lane's four rows, from a slot of shared memory: the scales of a warp's outputs, then their zeros.
template <typename T, int kBits>
struct Group {
    uint2 scales;
    Zero<T, kBits> zero[4];

    __device__ __forceinline__ Group(const unsigned char* slot, const Place& place)
        : scales(*reinterpret_cast<const uint2*>(slot + 8 * place.group)) {
        const uint32_t zeros = *reinterpret_cast<const uint32_t*>(slot + 2 * kWarpOutputs + 4 * place.group);
#pragma unroll
        for (int row = 0; row < 4; ++row) zero[row].set(zeros, row);
    }

    // sum += scale * partial
    template <int kTiles>
    __device__ __forceinline__ void add(float (&sum)[2][kTiles][4], const float (&partial)[2][kTiles][4]) const {
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
    sync_barrier(1, threads);
    if (thread == 0) {
        // Between the barriers, the fences are for what all threads of the block wrote and will read.
        memory_fence();
        *is_last = atomic_add(a.counters + first, 1) == static_cast<uint32_t>(last - first);
        memory_fence();
        if (*is_last) store_global(a.counters + first, 0u);
    }
    sync_barrier(1, threads);
    if (!*is_last) return false;
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

// ---- all of a block -------------------------------------------------------------------------------------------------

// Where the parts of a block's shared memory begin: the stages of all slices, some bytes of flags, the slices' sums.
struct SharedParts {
    unsigned char* stages;  // of this slice
    unsigned char* flags;   // kFlagBytes, of which the first 16 say who is the last to add
    float4* sums;

    __device__ __forceinline__ SharedParts(const LinearArguments& a, const Place& place, int stage_bytes)
        : stages(shared_memory() + place.slice * kStages * stage_bytes),
          flags(shared_memory() + a.slices * kStages * stage_bytes),
          sums(reinterpret_cast<float4*>(flags + kFlagBytes)) {}
};

// Goes through the block's stages. Stages are loaded up to three ahead of the one that is multiplied, across the border
// between tiles.
template <typename T, int kTiles, typename Loader, typename Multiplier>
__device__ __forceinline__ void make_tiles(const LinearArguments& a, const Place& place, const SharedParts& parts,
                                           int stage_bytes, int begin, int end, Loader& loader,
                                           Multiplier& multiplier) {
    loader.begin();
    const int units_per_group = a.groups == 1 ? kStageUnits : a.units / a.groups;
    unsigned buffer = 0;
    int at = begin + place.slice;
    for (int index = begin / a.stages; index * a.stages < end; ++index) {
        const Tile tile(a, index, place, kTiles * kTileRows);
        clear_sums(multiplier.sum);
        for (; at < min(end, (index + 1) * a.stages); at += a.slices) {
            loader.wait();
            loader.next();
            multiplier.start_stage(a, parts.stages + buffer * stage_bytes, tile.rows);
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
        if (a.slices > 1) add_slices(a, place, parts.sums, multiplier.sum);
        if (place.slice > 0) continue;
        const bool is_whole = begin <= index * a.stages && (index + 1) * a.stages <= end;
        if (is_whole || add_blocks(a, place, index, reinterpret_cast<int*>(parts.flags), multiplier.sum)) {
            store_tile<T>(a, place, tile, multiplier.sum);
        }
    }
}

}  // namespace autoq::cuda
