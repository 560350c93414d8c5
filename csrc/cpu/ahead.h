// How far ahead of its use memory is asked for.
#pragma once

#include <cstdint>

namespace autoq::cpu {

// Farther than the hardware's prefetchers look, and across pages, at which they stop.
constexpr int64_t kAheadBytes = 8192;

// The same for weights, which are read in order and once; 0 where the hardware is left alone. One core of an Intel Xeon
// (Sapphire Rapids) brings 7 GB/s by itself and 12 if it is asked ahead; one of an AMD EPYC (Zen 4) brings 26 to 28 of
// the 30 that memory gives it by itself, and 23 to 24 if it is asked ahead.
inline const int64_t weights_ahead_bytes = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return int64_t{0};
#endif
    return kAheadBytes;
}();

}  // namespace autoq::cpu
