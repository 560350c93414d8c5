// Dequantization on the GPU. A thread takes the same eight columns of four rows, which lie side by side in the packed
// layout, so that a warp writes 256 columns of a row at a time.
#include "dequantize.h"
#include "device.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread
constexpr int kRows = 4;
constexpr int kChunks = kThreads * kRows / kLanes;  // a block of threads takes all 16 rows of so many chunks of columns

// Code `i` of eight, of which `low` and `high` are the words; t is the place of the eight in their unit.
template <int kBits>
__device__ __forceinline__ int code(uint32_t low, uint32_t high, int t, int i) {
    if constexpr (kBits == 8) return ((i < 4 ? low : high) >> (8 * (i % 4))) & 255;
    if constexpr (kBits == 4) return (low >> (4 * i)) & 15;
    if constexpr (kBits == 2) return (low >> (16 * (t % 2) + 2 * i)) & 3;
    const int byte = 16 * (t % 2) + i / 4 * 8, place = i % 4;
    const uint32_t own = low >> byte, shared = high >> (byte + t / 2 * 4);
    if (place < 2) return (own >> (3 * place)) & 7;
    return place == 2 ? shared & 7 : ((own >> 6) & 3) | ((shared >> 1) & 4);
}

// Stores eight values, of which `count` are inside; all at once where the rows are aligned to that.
template <typename T>
__device__ __forceinline__ void store_row(T* to, const float (&values)[kColumns], int64_t count, bool is_aligned) {
    if (is_aligned && count >= kColumns) {
        if constexpr (sizeof(T) == 4) {
            auto* vectors = reinterpret_cast<float4*>(to);
            store_global(vectors, make_float4(values[0], values[1], values[2], values[3]));
            store_global(vectors + 1, make_float4(values[4], values[5], values[6], values[7]));
        } else {
            store_global(
                reinterpret_cast<uint4*>(to),
                make_uint4(pair_from_floats<T>(values[0], values[1]), pair_from_floats<T>(values[2], values[3]),
                           pair_from_floats<T>(values[4], values[5]), pair_from_floats<T>(values[6], values[7])));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        if (i < count) store_global(to + i, from_float<T>(values[i]));
    }
}

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(PackedWeight weight, int parts, T* dense) {
    const int64_t block = blockIdx.x / parts;
    const int64_t chunk = blockIdx.x % parts * kChunks + threadIdx.x % kChunks;
    const int64_t first = chunk * kColumns;
    const int lane = static_cast<int>(threadIdx.x) / kChunks * kRows;  // the first of the four rows
    if (first >= weight.in_features) return;

    const int t = static_cast<int>(chunk % 4);
    const uint32_t* unit = weight.unit(block, chunk / 4) + lane;
    const auto word = [&](int index) { return load_global(reinterpret_cast<const uint4*>(unit + index * kLanes)); };
    const uint4 low = word(kBits == 8 ? 2 * t : kBits == 4 ? t : t / 2);
    const uint4 high = kBits == 8 ? word(2 * t + 1) : kBits == 3 ? word(2) : low;
    const uint32_t lows[kRows] = {low.x, low.y, low.z, low.w}, highs[kRows] = {high.x, high.y, high.z, high.w};

    // Groups start at multiples of 16 columns, so one group holds all eight.
    const int64_t group = weight.groups == 1 ? 0 : first / weight.group_size;
    const int64_t parameters = (block * weight.groups + group) * kLanes + lane;
    const bool is_aligned = weight.in_features % kColumns == 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t row = block * kLanes + lane + r;
        if (row >= weight.out_features) return;
        const float scale = to_float(Half{load_global(weight.scales + parameters + r)});
        const int zero = load_global(weight.zeros + parameters + r);
        float values[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            values[i] = static_cast<float>(code<kBits>(lows[r], highs[r], t, i) - zero) * scale;
        }
        store_row(dense + row * weight.in_features + first, values, weight.in_features - first, is_aligned);
    }
}

template <typename T, int kBits>
const char* launch_for(const PackedWeight& weight, void* dense, void* stream) {
    const int64_t parts = (weight.in_features + kChunks * kColumns - 1) / (kChunks * kColumns);
    const int64_t blocks = parts * weight.row_blocks;
    if (blocks > 0x7fffffff) return "the weight is too large for one launch";
    return launch(dequantize_kernel<T, kBits>, {{static_cast<unsigned>(blocks)}, {kThreads}}, stream, weight,
                  static_cast<int>(parts), static_cast<T*>(dense));
}

template <typename T>
const char* launch_for(const PackedWeight& weight, void* dense, void* stream) {
    switch (weight.bits) {
        case 2:
            return launch_for<T, 2>(weight, dense, stream);
        case 3:
            return launch_for<T, 3>(weight, dense, stream);
        case 4:
            return launch_for<T, 4>(weight, dense, stream);
        default:
            return launch_for<T, 8>(weight, dense, stream);
    }
}

}  // namespace

const char* dequantize(const PackedWeight& weight, void* dense, Float dtype, void* stream) {
    switch (dtype) {
        case Float::kFloat32:
            return launch_for<float>(weight, dense, stream);
        case Float::kBFloat16:
            return launch_for<BFloat16>(weight, dense, stream);
        default:
            return launch_for<Half>(weight, dense, stream);
    }
}

}  // namespace autoq::cuda
