// Few rows: activations as exact integers, so that a dot product with integer codes is integer arithmetic.
//
// A block of at most 256 columns of one input row shares a power-of-two scale, and each value becomes a fixed-point
// integer, cut into signed base-256 digits:
//
//   x[k] ~ scale * (digit[0][k] + 256 * digit[1][k] (+ 65536 * digit[2][k]) (+ 2^24 * digit[3][k]))
//
// Instruction sets multiply unsigned bytes (the codes) by signed bytes (the digits) four at a time, which is faster
// than converting each code to fp32 and multiplying there: for 16 rows of 4-bit weights, 128 products per digit take
// two instructions, against sixteen in fp32. And integer sums are exact, so the result depends on no summation order:
// not on the instruction set, not on the number of threads, not on how many rows are in the batch.
//
// fp32 inputs get four digits, 30 bits below the largest value of the block. Rows of 16-bit inputs get two, 14 bits,
// which is exact for a bf16 down to 1/64 of the largest value, as long as what that rounds away is small beside the
// rounding that the input has been through already, and three, 22 bits, where outliers make it large (digits.h). Always
// taking three would cost half as many instructions again, on processors where these and not the memory are the limit.
// A power of two as scale keeps short mantissas exact.
//
// All sums stay below 2^24 (255 * 128 * 256), so they convert to fp32 exactly; products with the zero point as well.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "../layout.h"

namespace autoq::cpu {

constexpr int64_t kBlockHalves = 16;  // halves in a block at most: 256 columns
constexpr int kMaxDigits = 4;

inline int digit_fraction_bits(int digits) { return 8 * digits - 2; }

// Input rows, row-major and contiguous.
struct InputRows {
    const void* data;
    Float dtype;
    int64_t rows;
};

// Matrix units take the digits as tiles of at most 16 rows of 64 columns, a row for each digit of each input row.
constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileHalves = kTileColumns / kHalfColumns;
constexpr int64_t kMaxDigitTiles = 4;

// The fixed-point form of the rows. The pointers are borrowed from a scratch buffer.
struct FixedPointRows {
    int64_t rows;
    int digits;
    int64_t halves;        // 16-column steps in a row, padding included
    int64_t blocks;        // blocks in a row
    int64_t tile_rows;     // input rows in a tile, or 0 without tiles
    int64_t block_halves;  // in a block at most
    // The sixteen columns of a half in the order of `column_of`. Without tiles [rows][halves][digits][16], with tiles
    // [blocks][tiles of rows][tiles of columns][tile_rows][digits][64], where every block begins a new tile; columns
    // behind it are zero, rows behind the last anything.
    int8_t* values;
    float* scales;  // [rows][blocks]
    float* sums;    // [rows][blocks][digits], the sum of each digit over the block

    int8_t* half(int64_t row, int64_t half_index) const {
        return values + (row * halves + half_index) * digits * kHalfColumns;
    }

    int64_t row_tiles() const { return (rows + tile_rows - 1) / tile_rows; }
    int64_t block_tiles() const { return (block_halves + kTileHalves - 1) / kTileHalves; }
    int64_t tile_bytes() const { return tile_rows * digits * kTileColumns; }
    // The first tile of columns.
    int8_t* tile(int64_t block, int64_t row_tile) const {
        return values + (block * row_tiles() + row_tile) * block_tiles() * tile_bytes();
    }
    // The lowest digit; the others follow 64 bytes apart. `half_index` counts from the beginning of the block.
    int8_t* half_in_tile(int64_t row, int64_t block, int64_t half_index) const {
        int8_t* first = tile(block, row / tile_rows) + half_index / kTileHalves * tile_bytes();
        return first + row % tile_rows * digits * kTileColumns + half_index % kTileHalves * kHalfColumns;
    }
    int64_t value_bytes() const {
        return tile_rows == 0 ? rows * halves * digits * kHalfColumns
                              : blocks * row_tiles() * block_tiles() * tile_bytes();
    }
};

// Output rows, row-major with `stride` elements from one to the next. `bias` may be null; it has the rows' dtype.
struct OutputRows {
    void* data;
    Float dtype;
    int64_t stride;
    const void* bias;
};

inline int64_t blocks_per_group(const PackedWeight& weight) {
    return (weight.group_halves() + kBlockHalves - 1) / kBlockHalves;
}

// Which of the 16 columns of a half sits at byte `position`: byte b of 32-bit word p is position 4 * p + b.
// Masking a packed word of 4-bit codes with 0x0f0f0f0f leaves the even columns, one per byte; shifting it by 4 first
// leaves the odd ones. Two-bit fields (also those of 3-bit codes) come out in steps of four columns, 8-bit codes in
// order.
inline int column_of(int bits, int position) {
    const int word = position / 4, byte = position % 4;
    if (bits == 8) return position;
    if (bits == 4) return 8 * (word / 2) + 2 * byte + word % 2;
    return 4 * byte + word;
}

inline float load_float(const void* data, Float dtype, int64_t index) {
    switch (dtype) {
        case Float::kFloat32:
            return static_cast<const float*>(data)[index];
        case Float::kBFloat16:
            return static_cast<float>(static_cast<const c10::BFloat16*>(data)[index]);
        default:
            return static_cast<float>(static_cast<const c10::Half*>(data)[index]);
    }
}

inline void store_float(void* data, Float dtype, int64_t index, float value) {
    switch (dtype) {
        case Float::kFloat32:
            static_cast<float*>(data)[index] = value;
            break;
        case Float::kBFloat16:
            static_cast<c10::BFloat16*>(data)[index] = value;
            break;
        default:
            static_cast<c10::Half*>(data)[index] = value;
    }
}

inline float half_to_float(uint16_t bits) { return c10::Half(bits, c10::Half::from_bits()); }

// The power of two that turns the values of a block into integers below 2^fraction_bits, and its inverse, from the
// largest magnitude.
struct BlockScale {
    float to_integer;
    float to_float;
};

inline BlockScale block_scale(uint32_t largest_magnitude_bits, int fraction_bits) {
    // An infinite or NaN value has no fixed-point form: the block's products become NaN.
    if (largest_magnitude_bits >= 0x7f800000u) return {0.0f, __builtin_nanf("")};
    // The magnitude is below 2^exponent. The clamp keeps both powers of two normal numbers; what it cuts off is below
    // 2^-110.
    int exponent = static_cast<int>(largest_magnitude_bits >> 23) - 126;
    if (exponent < -96) exponent = -96;
    const int shift = fraction_bits - exponent;
    const uint32_t up = static_cast<uint32_t>(127 + shift) << 23;
    const uint32_t down = static_cast<uint32_t>(127 - shift) << 23;
    BlockScale scale;
    std::memcpy(&scale.to_integer, &up, 4);
    std::memcpy(&scale.to_float, &down, 4);
    return scale;
}

// The end of a block: the digits' integer sums become fp32 and are put together, most significant digit first.
// Multiplying by 256 is exact, so this is the same with and without fused multiply-add.
inline float combine_digits(const int32_t* dots, int stride, const float* sums, float zero, int digits) {
    float value = 0.0f;
    for (int d = digits - 1; d >= 0; --d) {
        const float centred = static_cast<float>(dots[d * stride]) - zero * sums[d];
        value = value * 256.0f + centred;
    }
    return value;
}

// Stores the sixteen results of one row and one block of outputs, with the bias, leaving out the padding.
inline void store_lanes(const float* lanes, const PackedWeight& weight, const OutputRows& output, int64_t row,
                        int64_t block) {
    const int64_t first = block * kLanes;
    const int64_t count = weight.out_features - first < kLanes ? weight.out_features - first : kLanes;
    for (int64_t lane = 0; lane < count; ++lane) {
        const float bias = output.bias ? load_float(output.bias, output.dtype, first + lane) : 0.0f;
        store_float(output.data, output.dtype, row * output.stride + first + lane, lanes[lane] + bias);
    }
}

}  // namespace autoq::cpu
