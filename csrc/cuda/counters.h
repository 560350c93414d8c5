// Counters in device memory for kernels whose blocks meet (linear.h).
#pragma once

#include <cstdint>

namespace autoq::cuda {

constexpr int kMostCounters = 1024;  // that one launch may use

// The counters for launches on a stream (a cudaStream_t) of the current device, kMostCounters of them: all zero, if
// every launch leaves them so. Returns null, or what went wrong.
const char* counters_for(void* stream, uint32_t*& counters);

}  // namespace autoq::cuda
