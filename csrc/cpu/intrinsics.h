// The intrinsics of x86 processors.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns of the undefined values inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
