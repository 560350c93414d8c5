// Regions of a source file that are compiled for an instruction set.
#pragma once

#define AUTOQ_STRING(...) #__VA_ARGS__
#if defined(__clang__)
#define AUTOQ_BEGIN_TARGET(features) \
    _Pragma(AUTOQ_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define AUTOQ_END_TARGET _Pragma("clang attribute pop")
#else
#define AUTOQ_BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma(AUTOQ_STRING(GCC target(features)))
#define AUTOQ_END_TARGET _Pragma("GCC pop_options")
#endif

#define AUTOQ_AVX2_FEATURES "avx2,fma,f16c"
#define AUTOQ_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define AUTOQ_AVX512_BF16_FEATURES AUTOQ_AVX512_FEATURES ",avx512bf16"
