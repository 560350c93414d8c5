// Dequantization on the GPU: plain and correct. Each thread writes the columns of one unit (32) of one row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dequantize.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline void store(float* out, float value) { *out = value; }
__device__ inline void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
__device__ inline void store(__half* out, float value) { *out = __float2half_rn(value); }

// One thread per row and unit. Sixteen neighbouring threads take the sixteen lanes of a unit, so that they read the
// packed words together.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(PackedWeight weight, T* dense) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t lane = thread % kLanes;
    const int64_t unit = thread / kLanes % weight.units;
    const int64_t block = thread / kLanes / weight.units;
    const int64_t row = block * kLanes + lane;
    if (block >= weight.row_blocks || row >= weight.out_features) return;

    const uint32_t* words = weight.unit(block, unit) + lane;
    for (int half = 0; half < 2; ++half) {
        const int64_t first = unit * kUnitColumns + half * kHalfColumns;
        if (first >= weight.in_features) return;
        // Groups start at multiples of a half, so one group holds all of its columns.
        const int64_t parameters = (block * weight.groups + first / weight.group_size) * kLanes + lane;
        const float scale = __half2float(__ushort_as_half(weight.scales[parameters]));
        const int zero = weight.zeros[parameters];
        for (int i = 0; i < kHalfColumns; ++i) {
            if (first + i >= weight.in_features) return;
            const int code = static_cast<int>(decode(words, weight.bits, half * kHalfColumns + i));
            store(dense + row * weight.in_features + first + i, static_cast<float>(code - zero) * scale);
        }
    }
}

template <typename T>
const char* launch(const PackedWeight& weight, void* dense, void* stream) {
    const int64_t threads = weight.row_blocks * weight.units * kLanes;
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    if (blocks > 0x7fffffff) return "the weight is too large for one launch";
    dequantize_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        weight, static_cast<T*>(dense));
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* dequantize(const PackedWeight& weight, void* dense, Float dtype, void* stream) {
    switch (dtype) {
        case Float::kFloat32:
            return launch<float>(weight, dense, stream);
        case Float::kBFloat16:
            return launch<__nv_bfloat16>(weight, dense, stream);
        default:
            return launch<__half>(weight, dense, stream);
    }
}

}  // namespace autoq::cuda
