// What the kernels ask of the GPU: every instruction that is not C++, and every access to global memory, behind a
// function. With AUTOQ_CUDA_HOST the same functions come from host.h, which emulates a GPU on the host
// (tests/cuda_host): kernels written against this header run in the test suite without a GPU. To keep that possible,
// kernels
//   - reach global memory through load_global, load_written, store_global, atomic_add and the asynchronous copies,
//   - take dynamic shared memory from shared_memory(),
//   - are launched by launch().
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace autoq::cuda {

// The 16-bit floating-point formats, by their bits. Two of them in a 32-bit word, the first in the low half, are a
// pair.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

struct Index3 {
    unsigned x = 1, y = 1, z = 1;
};

struct LaunchShape {
    Index3 grid, block;
    size_t shared_bytes = 0;  // of dynamic shared memory
};

struct DeviceProperties {
    int multiprocessors;
    int shared_bytes_per_block;  // the most that a block may ask for
    int major, minor;            // compute capability
};

}  // namespace autoq::cuda

#ifdef AUTOQ_CUDA_HOST
#include "host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <mutex>

namespace autoq::cuda {

// ---- numbers --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

// Rounds to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (std::is_same_v<T, Half>) {
        return Half{__half_as_ushort(__float2half_rn(value))};
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
    } else {
        return value;
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pair_from_floats(float low, float high) {
    uint32_t pair;
    if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// a * b + c of pairs, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if constexpr (std::is_same_v<T, Half>) {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
}

__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ float reciprocal_sqrt(float x) { return rsqrtf(x); }

// ---- bits -----------------------------------------------------------------------------------------------------------

// (a & mask) | bits, in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// Four of the eight bytes of `high:low`; each hexadecimal digit of the selector names one, 0 the lowest.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}

// ---- warps and blocks -----------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Ends the launch with an error.
__device__ __forceinline__ void trap() { __trap(); }
__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// Waits at barrier `id` (1 .. 15) for so many threads, a multiple of 32, of which each has come here or to
// arrive_barrier.
__device__ __forceinline__ void sync_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_barrier(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// sum += a * b on the tensor cores: a is 16 x 16, b 16 x 8, in the lanes' fragments (drawn in tests/cuda_host/host.h).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

// Reads what no thread of this launch writes.
template <typename T>
__device__ __forceinline__ T load_global(const T* pointer) {
    return *pointer;
}

template <>
__device__ __forceinline__ uint4 load_global(const uint4* pointer) {
    return __ldg(pointer);
}

template <>
__device__ __forceinline__ uint2 load_global(const uint2* pointer) {
    return __ldg(pointer);
}

template <>
__device__ __forceinline__ uint32_t load_global(const uint32_t* pointer) {
    return __ldg(pointer);
}

template <>
__device__ __forceinline__ float load_global(const float* pointer) {
    return __ldg(pointer);
}

// Reads what another thread of this launch wrote before a memory_fence, past the first-level cache.
template <typename T>
__device__ __forceinline__ T load_written(const T* pointer) {
    return __ldcg(pointer);
}

template <typename T>
__device__ __forceinline__ void store_global(T* pointer, T value) {
    *pointer = value;
}

// Returns the value before.
__device__ __forceinline__ uint32_t atomic_add(uint32_t* pointer, uint32_t value) { return atomicAdd(pointer, value); }

__device__ __forceinline__ void memory_fence() { __threadfence(); }

// Where something lies in shared memory, as the copies below want it. Bytes can be added to it.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes from global to shared memory; zeros where they are not inside. Both must be aligned to 16.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from, bool inside = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// How copies under a policy treat the second-level cache: what is read once is the first to leave it.
__device__ __forceinline__ uint64_t read_policy(bool once) {
    uint64_t policy;
    if (once) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    } else {
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    }
    return policy;
}

__device__ __forceinline__ void copy_async_16_under(SharedAddress to, const void* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups of copies, but for the newest ones.
template <int kNewest>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// ---- launching (on the host) ----------------------------------------------------------------------------------------

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Of the current device. Returns null, or what went wrong.
inline const char* device_properties(DeviceProperties& found) {
    constexpr int kDevices = 64;
    static struct {
        std::once_flag once;
        DeviceProperties properties;
        const char* error;
    } known[kDevices];
    int device = 0;
    if (const char* error = message(cudaGetDevice(&device))) return error;
    if (device >= kDevices) return "there are more devices than the kernels know of";
    auto& entry = known[device];
    std::call_once(entry.once, [&] {
        const struct {
            cudaDeviceAttr attribute;
            int* value;
        } wanted[] = {{cudaDevAttrMultiProcessorCount, &entry.properties.multiprocessors},
                      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &entry.properties.shared_bytes_per_block},
                      {cudaDevAttrComputeCapabilityMinor, &entry.properties.minor},
                      {cudaDevAttrComputeCapabilityMajor, &entry.properties.major}};
        for (const auto& [attribute, value] : wanted) {
            if (!entry.error) entry.error = message(cudaDeviceGetAttribute(value, attribute, device));
        }
    });
    found = entry.properties;
    return entry.error;
}

// Lets a kernel use as much shared memory as the device has, which for more than 48 KiB has to be asked for. Every
// thread asks for the same, whatever its launch needs: were it less, another thread's launch could come between.
inline const char* allow_shared_memory(const void* function, const LaunchShape& shape) {
    if (shape.shared_bytes <= 48 * 1024) return nullptr;
    DeviceProperties device{};
    cudaFuncAttributes attributes{};
    if (const char* error = device_properties(device)) return error;
    if (const char* error = message(cudaFuncGetAttributes(&attributes, function))) return error;
    const int most = device.shared_bytes_per_block - static_cast<int>(attributes.sharedSizeBytes);
    if (attributes.maxDynamicSharedSizeBytes >= most) return nullptr;
    return message(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Launches on a stream (a cudaStream_t). Returns null, or what went wrong.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   std::type_identity_t<Parameters>... arguments) {
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (const char* error = allow_shared_memory(function, shape)) return error;
    void* pointers[] = {&arguments...};
    const dim3 grid(shape.grid.x, shape.grid.y, shape.grid.z), block(shape.block.x, shape.block.y, shape.block.z);
    return message(
        cudaLaunchKernel(function, grid, block, pointers, shape.shared_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace autoq::cuda

#endif
