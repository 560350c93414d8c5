// What an instruction set offers. Each set fills in one table; the best one for the processor is chosen at run time.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "fixed_point.h"
#include "search.h"
#include "tiles.h"

// Whether the compiler lets single functions use the dot products of bytes; clang does since 16.
#if defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__) || __clang_major__ >= 16)
#define AUTOQ_NEON
#endif

namespace autoq::cpu {

// Up to so many rows are few where no matrix units multiply them.
constexpr int64_t kFewRows = 8;

inline int64_t no_digit_tiles(int64_t, int) { return 0; }

struct Kernels {
    // Up to how many rows are few: each costs little beside the reading of the weight.
    int64_t few_rows;
    // How many of them share a tile (`FixedPointRows::tile_rows`), or 0.
    int64_t (*digit_tile_rows)(int64_t rows, int digits);
    // Fills rows [begin, end) of `fixed` from the input.
    void (*prepare)(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
                    int64_t end);
    // Multiplies all rows with the weight's row blocks [begin, end).
    void (*multiply)(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                     int64_t end);
    // Many rows: what it wants in the tiles, and the same two steps.
    Element (*element)(Mode mode, Float dtype, int bits);
    void (*prepare_tiles)(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                          int64_t begin, int64_t end);
    void (*multiply_tiles)(const PackedWeight& weight, const ActivationTiles& tiles, const OutputRows& output,
                           int64_t begin, int64_t end);
    // Writes row blocks [begin, end) as dense rows; row `begin * 16` of the weight is the first row at `dense`.
    void (*dequantize)(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end);
    // The steps of a decoder block between its linears.
    const BlockKernels* block;
    // Whether torch's attention is faster for many tokens.
    bool torch_attends;
    const SearchKernels* search;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
#endif
#if defined(AUTOQ_NEON)
extern const Kernels neon_kernels;
#endif

// Name by name what the processor has, of the features that the kernels or their choice depend on.
std::vector<std::pair<std::string, bool>> features();

std::vector<std::string> capabilities();  // that this processor can run, worst first
std::string capability();
void set_capability(const std::string& name);  // throws std::invalid_argument for one that it cannot run

const Kernels& kernels();

}  // namespace autoq::cpu
