#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "counters.h"

namespace autoq::cuda {
namespace {

// Launches that may run at the same time must not share counters. Those of one stream touch them one after the
// other, even where they overlap; but graphs that were captured on one stream may run at the same time, so every
// capture has a set of its own, until the sets for captures are used up and the oldest is taken again; likewise for
// streams. Memory of the module is zero from the start: nothing has to be allocated or cleared, which matters while a
// graph is captured.
constexpr int kStreamSets = 64, kCaptureSets = 448;
__device__ uint32_t all_counters[kStreamSets + kCaptureSets][kMostCounters];

}  // namespace

const char* counters_for(void* stream, uint32_t*& counters) {
    struct Device {
        uint32_t* first = nullptr;
        int stream_sets = 0, capture_sets = 0;  // given out
    };
    using Key = std::tuple<int, void*, unsigned long long>;
    static std::mutex mutex;
    static auto& devices = *new std::map<int, Device>;
    static auto& sets = *new std::map<Key, int>;

    int index = 0;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess) {
        error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
    }
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (status != cudaStreamCaptureStatusActive) capture = 0;

    const std::lock_guard<std::mutex> lock(mutex);
    Device& device = devices[index];
    if (device.first == nullptr) {
        error = cudaGetSymbolAddress(reinterpret_cast<void**>(&device.first), all_counters);
        if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const int next = capture == 0 ? device.stream_sets % kStreamSets : kStreamSets + device.capture_sets % kCaptureSets;
    const auto [found, is_new] = sets.try_emplace(Key{index, stream, capture}, next);
    if (is_new) ++(capture == 0 ? device.stream_sets : device.capture_sets);
    counters = device.first + static_cast<int64_t>(found->second) * kMostCounters;
    return nullptr;
}

}  // namespace autoq::cuda
