// Compiles the block's kernels for each instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "block.h"
#include "dispatch.h"
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

// Floats that a thread keeps between calls, at the start of a cache line: registers that cross one load at half speed.
float* floats_of_thread(size_t count) {
    static thread_local std::vector<float> memory;
    if (memory.size() < count + kLanes) memory.resize(count + kLanes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
}

namespace portable {
#if defined(__aarch64__)
#define AUTOQ_LEVEL 128  // every such processor has NEON
#else
#define AUTOQ_LEVEL 0
#endif
#include "block_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace portable

#if defined(__x86_64__)
AUTOQ_BEGIN_TARGET(AUTOQ_AVX2_FEATURES)
namespace avx2 {
#define AUTOQ_LEVEL 256
#include "block_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace avx2
AUTOQ_END_TARGET

AUTOQ_BEGIN_TARGET(AUTOQ_AVX512_FEATURES)
namespace avx512 {
#define AUTOQ_LEVEL 512
#include "block_kernels.h"
#undef AUTOQ_LEVEL
}  // namespace avx512
AUTOQ_END_TARGET

AUTOQ_BEGIN_TARGET(AUTOQ_AVX512_BF16_FEATURES)
namespace avx512_bf16 {
#define AUTOQ_LEVEL 512
#define AUTOQ_BF16_PAIRS
#include "block_kernels.h"
#undef AUTOQ_BF16_PAIRS
#undef AUTOQ_LEVEL
}  // namespace avx512_bf16
AUTOQ_END_TARGET

constexpr BlockKernels with_attention(BlockKernels kernels, decltype(BlockKernels::attend) attend) {
    kernels.attend = attend;
    return kernels;
}
#endif

}  // namespace

const BlockKernels portable_block = portable::kernels_of_set;
#if defined(__x86_64__)
const BlockKernels avx2_block = avx2::kernels_of_set;
const BlockKernels avx512_block = avx512::kernels_of_set;
const BlockKernels avx512_bf16_block = with_attention(avx512::kernels_of_set, avx512_bf16::attend);
#endif

}  // namespace autoq::cpu
