// Compiles the search's kernels for each instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "fixed_point.h"
#include "search.h"
#include "targets.h"

#if defined(__x86_64__)
#include "intrinsics.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Functions that take vectors are inlined, so how a call would pass them does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace autoq::cpu {
namespace {

constexpr float kSmallestScale = 5.9604644775390625e-8f;  // 2^-24, the smallest fp16 above zero

namespace portable {
#if defined(__aarch64__)
#define AUTOQ_LEVEL 128  // every such processor has NEON
#else
#define AUTOQ_LEVEL 0
#endif
#include "search_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace portable

#if defined(__x86_64__)
AUTOQ_BEGIN_TARGET(AUTOQ_AVX2_FEATURES)
namespace avx2 {
#define AUTOQ_LEVEL 256
#include "search_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace avx2
AUTOQ_END_TARGET

AUTOQ_BEGIN_TARGET(AUTOQ_AVX512_FEATURES)
namespace avx512 {
#define AUTOQ_LEVEL 512
#include "search_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace avx512
AUTOQ_END_TARGET
#endif

}  // namespace

const SearchKernels portable_search = portable::kernels_of_set;
#if defined(__x86_64__)
const SearchKernels avx2_search = avx2::kernels_of_set;
const SearchKernels avx512_search = avx512::kernels_of_set;
#endif

}  // namespace autoq::cpu
