// Dequantization on the GPU: plain and correct. Each thread writes the columns of one unit (32) of one row.
#include "dequantize.h"
#include "device.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 256;

// One thread per row and unit. Sixteen neighbouring threads take the sixteen lanes of a unit, so that they read the
// packed words together.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(PackedWeight weight, T* dense) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t lane = thread % kLanes;
    const int64_t unit = thread / kLanes % weight.units;
    const int64_t block = thread / kLanes / weight.units;
    const int64_t row = block * kLanes + lane;
    if (block >= weight.row_blocks || row >= weight.out_features) return;

    uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = load_global(weight.unit(block, unit) + i * kLanes + lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t first = unit * kUnitColumns + half * kHalfColumns;
        if (first >= weight.in_features) return;
        // Groups start at multiples of a half, so one group holds all of its columns.
        const int64_t parameters = (block * weight.groups + first / weight.group_size) * kLanes + lane;
        const float scale = to_float(Half{load_global(weight.scales + parameters)});
        const int zero = load_global(weight.zeros + parameters);
#pragma unroll
        for (int i = 0; i < kHalfColumns; ++i) {
            if (first + i >= weight.in_features) return;
            const int code = static_cast<int>(decode(words, kBits, half * kHalfColumns + i, 1));
            store_global(dense + row * weight.in_features + first + i,
                         from_float<T>(static_cast<float>(code - zero) * scale));
        }
    }
}

template <typename T, int kBits>
const char* launch_for(const PackedWeight& weight, void* dense, void* stream) {
    const int64_t threads = weight.row_blocks * weight.units * kLanes;
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    if (blocks > 0x7fffffff) return "the weight is too large for one launch";
    return launch(dequantize_kernel<T, kBits>, {{static_cast<unsigned>(blocks)}, {kThreads}}, stream, weight,
                  static_cast<T*>(dense));
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
