// Many rows: activations and weights as tiles of integers, the form in which matrix units and vector units alike
// multiply fastest.
//
// A block of columns of one input row becomes integers that share a scale. In the mode
//
//   exact   the scale is a power of two, and a value one 16-bit integer ("word") when the input has 16 bits, two when
//           it is fp32:
//               x[k] ~ scale * (word[0][k] + 65536 * word[1][k])
//           For bf16 inputs and codes of at most 4 bits, a block has at most 128 columns, and a word 13 bits below the
//           largest value: so few that sums of products fit the mantissa of fp32, and matrix units for bf16, given the
//           values rounded to such words, sum them exactly too. Otherwise a block has at most 256 columns as in
//           fixed_point.h, a word 15 bits, two words 30. Rounding the weights to bf16 costs 1.6e-3 of a result; words
//           of 13 bits 4e-5 on gaussian data, and with outlier channels 6e-4.
//   int8    a block has at most 64 columns, and the values between its least and its largest (zero among them) become
//           8-bit integers around a zero point:
//               x[k] ~ scale * (byte[k] - zero_point)
//           The zero point is worth it: 5.3e-3 on gaussian data against 5.9e-3 for bytes with a sign. Outliers, which
//           would take the range for themselves, are multiplied apart (outliers.h): one channel in 64 thirty times as
//           large as the others makes it 2.3e-3, with outliers among the bytes 9.8e-3.
//
// What a block adds to a result, the same for every instruction set to the last bit, and for every batch:
//
//   dot[w]  = sum over k of (code[k] - zero) * word[w][k]                exact, in 32 bits
//   result  = fma(float(dot[w]) * (scale * 65536^w), weight scale, result)      for each w
//
// A tile is 16 rows of 64 bytes, of activations one input row in each, of weights four bytes for each of 16 outputs:
// 64 columns as bytes, 32 as words. Every block begins a new tile.
//
//   activations   row 0:  | columns 0-3   | columns 4-7   | ... | columns 60-63  |
//                 row 1:  | ...
//   weights       row 0:  | columns 0-3 of output 0       | columns 0-3 of output 1  | ... | of output 15 |
//                 row 1:  | columns 4-7 of output 0       | ...
//
// ("columns 0-3" in the order in which unpacking leaves them: `column_in_tile`.)
#pragma once

#include <cmath>
#include <vector>

#include "fixed_point.h"

namespace autoq::cpu {

enum class Mode { kExact, kInt8 };
// What tiles hold. A word in tiles of bytes is two of them, the low one first; in tiles of bf16 it is `scale * word`.
enum class Element { kByte, kWord, kBFloat16 };

constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * 64;
constexpr int kMaxWords = 2;

// What the end of a block needs of a row, for one word.
struct RowBlock {
    float scale;
    float zero_point;  // of mode int8 in bytes
    int32_t sum;       // of the words over the block
};

// A value of a row that is multiplied by itself (outliers.h).
struct Outlier {
    int32_t column;
    float value;
};

constexpr int64_t kBlockOutliers = 8;  // in a block at most

// Weights are unpacked this many at a time and multiplied with all rows while they are in the second-level cache; the
// tiles of two row blocks, which the inner loops use, and those of the activations fit the first level.
constexpr int64_t kPanelBlocks = 16;  // row blocks of 16 outputs
constexpr int64_t kSliceTiles = 8;    // tiles of each, for consecutive blocks of columns; no block has more

// A block of columns: where it is in the weight and in the tiles.
struct ColumnBlock {
    int64_t group;
    int64_t begin, end;  // halves
    int64_t tiles;
    int64_t tile;          // its first one in its slice; 0 begins a slice
    int64_t slice_tiles;   // tiles in the slice
    int64_t tiles_before;  // in the slices before
};

// How an input becomes integers.
struct Rounding {
    Mode mode;
    int words;
    int fraction_bits;     // of mode exact
    int64_t block_halves;  // halves in a block at most
};

inline Rounding rounding_of(Mode mode, Float dtype, int bits) {
    if (mode == Mode::kInt8) return {mode, 1, 0, 4};
    // 16-bit inputs have mantissas short enough that 15 bits cannot round up to 2^15.
    if (dtype == Float::kFloat32) return {mode, 2, 30, kBlockHalves};
    return dtype == Float::kBFloat16 && bits <= 4 ? Rounding{mode, 1, 13, 8} : Rounding{mode, 1, 15, kBlockHalves};
}

// Input rows as tiles. The pointers are borrowed from a scratch buffer.
struct ActivationTiles {
    Rounding rounding;
    Element element;
    int64_t rows;
    int planes;                       // tiles for the same rows and columns: one for each word, or for each byte of it
    std::vector<ColumnBlock> blocks;  // of a row
    // Slice by slice, [rows / 16][tiles of the slice][planes][16][64], in the order in which they are multiplied.
    // Behind the last row and column: anything.
    uint8_t* values;
    RowBlock* parameters;  // [rows / 16][blocks][16][words]; behind the last row: anything
    // Of mode int8.
    Outlier* outliers;        // [rows][blocks * kBlockOutliers], those of a row one behind the other
    int64_t* outlier_counts;  // [rows]
    uint8_t* has_outliers;    // [columns], whether any row has one there

    int64_t block_count() const { return static_cast<int64_t>(blocks.size()); }
    int64_t tiles() const { return blocks.back().tiles_before + blocks.back().slice_tiles; }
    int64_t row_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    int64_t half_bytes() const { return element == Element::kByte ? kHalfColumns : 2 * kHalfColumns; }
    int64_t tiles_of(int64_t halves) const { return (halves * half_bytes() + 63) / 64; }
    // Steps of four bytes in each row of a block's tiles.
    int64_t steps(const ColumnBlock& block) const { return (block.end - block.begin) * half_bytes() / 4; }

    int64_t columns() const { return blocks.back().end * kHalfColumns; }
    Outlier* row_outliers(int64_t row) const { return outliers + row * block_count() * kBlockOutliers; }

    // Where the values of a row begin that belong to a block.
    uint8_t* row(int64_t row, const ColumnBlock& block) const {
        const int64_t tile = block.tiles_before * row_tiles() + row / kTileRows * block.slice_tiles + block.tile;
        return values + tile * planes * kTileBytes + row % kTileRows * 64;
    }
    // How far from there the sixteen values of one of the block's halves are.
    int64_t half_offset(int64_t half, int plane) const {
        const int64_t bytes = half * half_bytes();
        return (bytes / 64 * planes + plane) * kTileBytes + bytes % 64;
    }
    RowBlock* row_block(int64_t row, int64_t block) const {
        const int64_t tile = (row / kTileRows * block_count() + block) * kTileRows;
        return parameters + (tile + row % kTileRows) * rounding.words;
    }
};

// Which of the 16 columns of a half is the value `index` of its 16 in a tile. Words: a register of four codes in each
// lane gives the even ones first, then the odd ones.
inline int column_in_tile(int bits, Element element, int index) {
    constexpr int kPairs[4] = {0, 2, 1, 3};
    return column_of(bits, element == Element::kByte ? index : index / 4 * 4 + kPairs[index % 4]);
}

// ---- scales --------------------------------------------------------------------------------------------------------

struct ByteScale {
    float to_integer;
    float to_float;
    int32_t zero_point;
};

// From the least and the largest value of a block, zero among them, which must be finite.
inline ByteScale byte_scale(float least, float largest) {
    const float half_range = 0.5f * largest - 0.5f * least;  // the whole range may overflow
    if (!(half_range > 0x1p-96f)) return {0.0f, 0.0f, 0};
    const float to_integer = 127.0f / half_range;
    return {to_integer, half_range / 127.0f, static_cast<int32_t>(-std::nearbyint(least * to_integer))};
}

// ---- a panel of weights -------------------------------------------------------------------------------------------

// What the end of a block needs of 16 outputs.
struct alignas(64) OutputBlock {
    float scales[kLanes];
    float sums[kLanes];      // of the weights in the tile over the block
    int32_t shifts[kLanes];  // what the weights in the tile lack of `code - zero`, the other way round; only for 8 bits
};

// Part of the weight: some row blocks, and of them the blocks of columns [first_block, last_block), a slice.
struct Panel {
    const PackedWeight* weight;
    int64_t first_row_block, row_blocks;
    int64_t first_block, last_block;
    int64_t row_tiles;
    uint8_t* tiles;        // [kPanelBlocks][kSliceTiles][16][64]
    OutputBlock* outputs;  // [kPanelBlocks][kSliceTiles]
    float* results;        // [kPanelBlocks][rows / 16][16][16]

    uint8_t* tile(int64_t row_block, const ColumnBlock& block) const {
        return tiles + (row_block * kSliceTiles + block.tile) * kTileBytes;
    }
    OutputBlock& output(int64_t row_block, int64_t block) const {
        return outputs[row_block * kSliceTiles + block - first_block];
    }
    int64_t result_bytes() const {
        return kPanelBlocks * row_tiles * kTileRows * kLanes * static_cast<int64_t>(sizeof(float));
    }
    // Sixteen results of a row.
    float* result(int64_t row, int64_t row_block) const {
        return results + ((row_block * row_tiles + row / kTileRows) * kTileRows + row % kTileRows) * kLanes;
    }
};

}  // namespace autoq::cpu
