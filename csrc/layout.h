// The packed layout of a quantized weight, shared by every kernel on every device. It knows no torch.
//
// N output features are padded to `row_blocks` blocks of 16 rows, K input features to `units` units of 32 columns.
// Rows are interleaved by 16, so that one 64-byte load brings the same columns of 16 rows, one row in each 32-bit lane:
//
//   codes [row_blocks][units][bits][16] 32-bit words
//
//                          lane 0        lane 1               lane 15
//   block 0, unit 0, word 0 | row 0        | row 1        | ... | row 15       |   64 bytes
//                    word 1 | row 0        | row 1        | ... | row 15       |
//                    ...      `bits` words hold the 32 columns of a unit
//            unit 1, word 0 | ...
//
//   bits 2, 4, 8: word j holds 32/bits consecutive codes; code i of the unit is in word i / (32/bits), at bit
//                 bits * (i % (32/bits)).
//   bits 3:       four codes in a row, 4 b .. 4 b + 3 of a half of 16, take byte b of a word and half of byte b of
//                 another, so that masks and shifts that are the same for all bytes take them out again. Word h is
//                 that of half h, word 2 that of both:
//
//                   word h, byte b    | low two bits of code 3 | code 1 | code 0 |
//                   word 2, byte b    | code 3's high bit, code 2 (half 1) | the same (half 0) |
//
//   scales [row_blocks][groups][16] fp16, zeros [row_blocks][groups][16] uint8
//
// The tensor cores of GPUs take it as it is: 16 bytes hold the same columns of four rows, which is what one lane of a
// warp contributes to four products. cuda/linear_kernel.h draws how.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define AUTOQ_HOST_DEVICE __host__ __device__
#else
#define AUTOQ_HOST_DEVICE
#endif

namespace autoq {

constexpr int kLanes = 16;        // output rows in a block
constexpr int kUnitColumns = 32;  // input columns in a unit
constexpr int kHalfColumns = 16;  // the step of the CPU kernels: groups always start at a multiple of it

// The dtypes of activations and dense weights.
enum class Float { kFloat32, kBFloat16, kFloat16 };

// A packed weight. The pointers are borrowed.
struct PackedWeight {
    const uint32_t* codes;
    const uint16_t* scales;  // fp16 bits
    const uint8_t* zeros;
    int bits;
    int64_t out_features;
    int64_t in_features;
    int64_t row_blocks;
    int64_t units;
    int64_t groups;
    int64_t group_size;  // columns in a group; a multiple of 16 unless there is only one group

    // Halves (16 columns) that a group spans. A single group also covers the padding behind the last column.
    AUTOQ_HOST_DEVICE int64_t group_halves() const { return groups == 1 ? units * 2 : group_size / kHalfColumns; }

    AUTOQ_HOST_DEVICE const uint32_t* unit(int64_t block, int64_t unit) const {
        return codes + (block * units + unit) * bits * kLanes;
    }
};

// Code `i` (0 .. 31) of one row of a unit. `word` points at the row's lane of the unit's first word.
AUTOQ_HOST_DEVICE inline uint32_t decode(const uint32_t* word, int bits, int i) {
    if (bits == 3) {
        const int half = i / kHalfColumns, byte = i % kHalfColumns / 4, place = i % 4;
        const uint32_t own = word[half * kLanes] >> (8 * byte);
        const uint32_t shared = word[2 * kLanes] >> (8 * byte + 4 * half);
        if (place < 2) return (own >> (3 * place)) & 7u;
        return place == 2 ? shared & 7u : ((own >> 6) & 3u) | ((shared >> 1) & 4u);
    }
    const int fields = 32 / bits;  // in a word
    return (word[(i / fields) * kLanes] >> (bits * (i % fields))) & ((1u << bits) - 1);
}

}  // namespace autoq
