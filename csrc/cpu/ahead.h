// How far ahead of its use memory is asked for.
#pragma once

#include <cstdint>

namespace autoq::cpu {

// In bytes: farther than the hardware's prefetchers look, and across pages, at which they stop.
constexpr int64_t kAheadBytes = 8192;

// The same for weights, which are read once and in order; 0 where the hardware is to be left alone. One core of an
// Intel Xeon (Sapphire Rapids) brings 7 GB/s by itself and 12 if it is asked ahead; two of an AMD EPYC (Zen 4) bring 44
// by themselves and 35 if they are asked ahead.
inline const int64_t weights_ahead = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return int64_t{0};
#endif
    return kAheadBytes;
}();

}  // namespace autoq::cpu
