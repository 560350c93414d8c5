// Kernels that follow each other without a gap.
//
// A decoded token is some hundreds of kernels of a few microseconds, each waiting for the one before. From Hopper on
// the next one is launched while the last still runs (programmatic dependent launch): it waits for results in its first
// lines, where it would otherwise wait for its own launch. Every thread of a kernel launched this way has to do so
// before it touches memory, be it to write: only then is all complete that was launched before the one before it, so
// that kernels can pass on what they share (counters, scratch, memory that torch hands out again). The exception is
// what the kernel directly before does not write, if that one waits itself: a linear reads some of its weight first.
#pragma once

#include "device.h"

namespace autoq::cuda {

#ifndef AUTOQ_CUDA_HOST  // where tests/cuda_host/host.h has them

// Whether kernels overlap on the architecture that is compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kOverlaps = false;
#else
constexpr bool kOverlaps = true;
#endif

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks come, as soon as all of this kernel's have called it and there is room for them.
__device__ __forceinline__ void let_the_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `launch`, for a kernel that calls wait_for_earlier_kernels.
template <typename... Parameters>
const char* launch_overlapping(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                               std::type_identity_t<Parameters>... arguments) {
    // What runs may have been made from code for an older architecture, which does not wait.
    cudaFuncAttributes attributes{};
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (const char* error = message(cudaFuncGetAttributes(&attributes, function))) return error;
    if (attributes.ptxVersion < 90) return launch(kernel, shape, stream, arguments...);
    if (const char* error = allow_shared_memory(function, shape)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
    config.blockDim = dim3(shape.block.x, shape.block.y, shape.block.z);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

#endif

// Returns null, or what keeps a grid of this size from being launched.
inline const char* make_grid(int64_t x, int64_t y, int64_t z, Index3& grid) {
    if (x < 1 || y < 1 || z < 1 || x > 0x7fffffff || y > 0xffff || z > 0xffff) {
        return "there is too much of it for one launch";
    }
    grid = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    return nullptr;
}

}  // namespace autoq::cuda
