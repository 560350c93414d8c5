// Values in memory and in registers, and sums over warps and blocks, as the kernels of a decoder block need them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../layout.h"
#include "device.h"

namespace autoq::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(int8_t value) { return static_cast<float>(value); }

// `COUNT` values that move together, in one access.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};

// Reads by plain accesses, never by those for what nobody writes while a kernel runs: kernels overlap (overlap.h).
template <typename T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
    return load_global(reinterpret_cast<const Pack<T, COUNT>*>(from));
}

template <typename T>
__device__ __forceinline__ T load_value(const T* from) {
    return load_pack<T, 1>(from).values[0];
}

template <typename T, int COUNT>
__device__ __forceinline__ void load_values(const T* from, float (&values)[COUNT]) {
    const Pack<T, COUNT> pack = load_pack<T, COUNT>(from);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = to_float(pack.values[i]);
}

template <typename T, int COUNT>
__device__ __forceinline__ void store_values(T* to, const float (&values)[COUNT]) {
    Pack<T, COUNT> pack;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) pack.values[i] = from_float<T>(values[i]);
    store_global(reinterpret_cast<Pack<T, COUNT>*>(to), pack);
}

// One value of a dtype known at run time, where few are read.
__device__ __forceinline__ float read_value(const void* data, Float dtype, int64_t index) {
    switch (dtype) {
        case Float::kFloat32:
            return load_value(static_cast<const float*>(data) + index);
        case Float::kBFloat16:
            return to_float(load_value(static_cast<const BFloat16*>(data) + index));
        default:
            return to_float(load_value(static_cast<const Half*>(data) + index));
    }
}

__device__ __forceinline__ void write_value(void* data, Float dtype, int64_t index, float value) {
    switch (dtype) {
        case Float::kFloat32:
            return store_global(static_cast<float*>(data) + index, value);
        case Float::kBFloat16:
            return store_global(static_cast<BFloat16*>(data) + index, from_float<BFloat16>(value));
        default:
            return store_global(static_cast<Half*>(data) + index, from_float<Half>(value));
    }
}

// Over the lanes of a warp that differ in the low bits of their number, `lanes` of them; each gets the result.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes = kWarp) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
}

__device__ __forceinline__ float largest_of_lanes(float value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value = fmaxf(value, shuffle_xor(value, distance));
    return value;
}

// Over a block of whole warps, through shared memory for a value of each; every thread gets the result.
__device__ __forceinline__ float sum_of_block(float value, float* shared) {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    value = sum_of_lanes(value);
    if (lane == 0) shared[threadIdx.x / kWarp] = value;
    sync_threads();
    value = sum_of_lanes(lane < warps ? shared[lane] : 0.0f);
    sync_threads();  // before the memory is used again
    return value;
}

// Whether all pointers are aligned for accesses of 16 bytes.
inline bool are_aligned(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    }
    return true;
}

// Calls the function with a value of the dtype's type.
template <class Function>
auto with_type(Float dtype, Function&& function) {
    switch (dtype) {
        case Float::kFloat32:
            return function(float{});
        case Float::kBFloat16:
            return function(BFloat16{});
        default:
            return function(Half{});
    }
}

}  // namespace autoq::cuda
