// The kernels in plain C++: what every processor can run, and the plainest statement of what the others compute.
#include <cmath>

#include "dispatch.h"

namespace autoq::cpu {
namespace {

// The columns of halves [begin, end) of one input row, and zeros behind the last column.
struct BlockValues {
    float values[kBlockHalves * kHalfColumns];
    uint32_t largest_magnitude = 0;

    BlockValues(const PackedWeight& weight, const InputRows& input, int64_t row, int64_t begin, int64_t end) {
        for (int64_t i = 0; i < (end - begin) * kHalfColumns; ++i) {
            const int64_t column = begin * kHalfColumns + i;
            const float value = column < weight.in_features
                                    ? load_float(input.data, input.dtype, row * weight.in_features + column)
                                    : 0.0f;
            values[i] = value;
            largest_magnitude = std::max(largest_magnitude, magnitude_bits(value));
        }
    }

    // A factor of zero stands for a block without a fixed-point form, whose values may not be converted.
    int32_t integer(int64_t column, float to_integer) const {
        return to_integer > 0.0f ? static_cast<int32_t>(std::lrint(values[column] * to_integer)) : 0;
    }
};

// ---- few rows -----------------------------------------------------------------------------------------------------

// One value, cut into digits, least significant first. The bound on the value leaves nothing for digits behind the
// last.
void split_digits(int32_t value, int8_t (&digits)[kMaxDigits]) {
    for (int8_t& digit : digits) {
        digit = static_cast<int8_t>(value);
        value = (value - digit) >> 8;
    }
}

void prepare_block(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t row,
                   int64_t block, int64_t begin, int64_t end, const int8_t* columns) {
    const BlockValues values(weight, input, row, begin, end);
    const BlockScale scale = block_scale(values.largest_magnitude, digit_fraction_bits(fixed.digits));
    int32_t sums[kMaxDigits] = {0};
    for (int64_t half = begin; half < end; ++half) {
        int8_t* out = fixed.half(row, half);
        for (int position = 0; position < kHalfColumns; ++position) {
            const int64_t column = (half - begin) * kHalfColumns + columns[position];
            int8_t digits[kMaxDigits];
            split_digits(values.integer(column, scale.to_integer), digits);
            for (int d = 0; d < fixed.digits; ++d) {
                out[d * kHalfColumns + position] = digits[d];
                sums[d] += digits[d];
            }
        }
    }
    fixed.scales[row * fixed.blocks + block] = scale.to_float;
    for (int d = 0; d < fixed.digits; ++d) {
        fixed.sums[(row * fixed.blocks + block) * fixed.digits + d] = static_cast<float>(sums[d]);
    }
}

void prepare(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
             int64_t end) {
    prepare_digits(prepare_block, weight, input, fixed, begin, end);
}

// Integer dot products of one row with 16 outputs over the halves [begin, end).
void dot_block(const PackedWeight& weight, const FixedPointRows& fixed, int64_t row, int64_t row_block, int64_t begin,
               int64_t end, int32_t (&dots)[kMaxDigits][kLanes]) {
    for (int64_t half = begin; half < end; ++half) {
        const uint32_t* words = weight.unit(row_block, half / 2);
        const int8_t* digits = fixed.half(row, half);
        for (int position = 0; position < kHalfColumns; ++position) {
            const int column = static_cast<int>(half % 2) * kHalfColumns + column_of(weight.bits, position);
            for (int lane = 0; lane < kLanes; ++lane) {
                const int32_t code = static_cast<int32_t>(decode(words + lane, weight.bits, column));
                for (int d = 0; d < fixed.digits; ++d) dots[d][lane] += code * digits[d * kHalfColumns + position];
            }
        }
    }
}

void multiply_row(const PackedWeight& weight, const FixedPointRows& fixed, int64_t row, int64_t row_block,
                  float (&result)[kLanes]) {
    for_each_block(weight, kBlockHalves, [&](int64_t block, int64_t group, int64_t begin, int64_t end) {
        const int64_t parameters = (row_block * weight.groups + group) * kLanes;
        const int64_t index = row * fixed.blocks + block;
        int32_t dots[kMaxDigits][kLanes] = {{0}};
        dot_block(weight, fixed, row, row_block, begin, end, dots);
        for (int lane = 0; lane < kLanes; ++lane) {
            const float zero = weight.zeros[parameters + lane];
            const float scale = half_to_float(weight.scales[parameters + lane]);
            const float value =
                combine_digits(&dots[0][lane], kLanes, fixed.sums + index * fixed.digits, zero, fixed.digits);
            result[lane] += scale * (value * fixed.scales[index]);
        }
    });
}

void multiply(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
              int64_t end) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        for (int64_t row = 0; row < fixed.rows; ++row) {
            float result[kLanes] = {0};
            multiply_row(weight, fixed, row, row_block, result);
            store_lanes(result, weight, output, row, row_block);
        }
    }
}

// ---- many rows ----------------------------------------------------------------------------------------------------

Element element(Mode, Float, int) { return Element::kWord; }

BlockScale tile_scale(const BlockValues& values, int64_t count, const ActivationTiles& tiles) {
    const BlockScale scale = block_scale(values.largest_magnitude, tiles.rounding.fraction_bits);
    if (tiles.rounding.mode == Mode::kExact || scale.to_integer == 0.0f) return scale;
    float least = 0.0f, largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        least = std::min(least, values.values[i]);
        largest = std::max(largest, values.values[i]);
    }
    const ByteScale byte = byte_scale(least, largest);
    return {byte.to_integer, byte.to_float};
}

void prepare_tile_block(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles, int64_t row,
                        int64_t index, const int32_t* columns) {
    const ColumnBlock& block = tiles.blocks[index];
    BlockValues values(weight, input, row, block.begin, block.end);
    if (tiles.rounding.mode == Mode::kInt8) {
        values.largest_magnitude = take_outliers(tiles, row, block, values.values, values.largest_magnitude);
    }
    const BlockScale scale = tile_scale(values, (block.end - block.begin) * kHalfColumns, tiles);
    uint8_t* out = tiles.row(row, block);
    for (int64_t half = 0; half < block.end - block.begin; ++half) {
        for (int i = 0; i < kHalfColumns; ++i) {
            int32_t rest = values.integer(half * kHalfColumns + columns[i], scale.to_integer);
            for (int word = 0; word < tiles.rounding.words; ++word) {
                const int16_t value = static_cast<int16_t>(rest);
                std::memcpy(out + tiles.half_offset(half, word) + 2 * i, &value, 2);
                rest = (rest - value) >> 16;
            }
        }
    }
    RowBlock* parameters = tiles.row_block(row, index);
    parameters[0] = {scale.to_float, 0.0f, 0};
    if (tiles.rounding.words == 2) parameters[1] = {scale.to_float * 65536.0f, 0.0f, 0};
}

void prepare_tiles(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles, int64_t begin,
                   int64_t end) {
    prepare_each_tile_block(prepare_tile_block, weight, input, tiles, begin, end);
}

void unpack_block(const PackedWeight& weight, const ColumnBlock& block, int64_t row_block, uint8_t* tile,
                  OutputBlock& output) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t parameters = (row_block * weight.groups + block.group) * kLanes + lane;
        output.scales[lane] = half_to_float(weight.scales[parameters]);
        for (int64_t half = block.begin; half < block.end; ++half) {
            const uint32_t* words = weight.unit(row_block, half / 2) + lane;
            for (int index = 0; index < kHalfColumns; ++index) {
                const int column =
                    static_cast<int>(half % 2) * kHalfColumns + column_in_tile(weight.bits, Element::kWord, index);
                const int code = static_cast<int>(decode(words, weight.bits, column));
                const int16_t value = static_cast<int16_t>(code - weight.zeros[parameters]);
                const int64_t step = (half - block.begin) * 8 + index / 2;
                std::memcpy(tile + step * 64 + lane * 4 + index % 2 * 2, &value, 2);
            }
        }
    }
}

void unpack_panel(const ActivationTiles& rows, const Panel& panel) { unpack_blocks(unpack_block, rows, panel); }

// Integer dot products of one word of one row with 16 outputs.
void dot_tiles(const ActivationTiles& rows, const uint8_t* values, const uint8_t* weights, int64_t steps,
               int32_t (&dots)[kLanes]) {
    for (int64_t step = 0; step < steps; ++step) {
        int16_t pair[2];
        std::memcpy(pair, values + step / 16 * rows.planes * kTileBytes + step % 16 * 4, 4);
        for (int lane = 0; lane < kLanes; ++lane) {
            int16_t weight[2];
            std::memcpy(weight, weights + step * 64 + lane * 4, 4);
            dots[lane] += pair[0] * weight[0] + pair[1] * weight[1];
        }
    }
}

void multiply_outliers(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                       const OutlierWeights& weights) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        for (int64_t i = 0; i < kOutlierBlocks; ++i) {
            float* result = panel.result(row, row_block + i);
            std::fill_n(result, kLanes, 0.0f);
            for (int64_t o = 0; o < rows.outlier_counts[row]; ++o) {
                const Outlier outlier = rows.row_outliers(row)[o];
                const float* weight = weights.of_column(outlier.column) + i * kLanes;
                for (int lane = 0; lane < kLanes; ++lane) {
                    result[lane] = std::fma(outlier.value, weight[lane], result[lane]);
                }
            }
        }
    }
}

void multiply_panel(const ActivationTiles& rows, const Panel& panel) {
    for (int64_t row_block = 0; row_block < panel.row_blocks; ++row_block) {
        for (int64_t row = 0; row < rows.rows; ++row) {
            float* result = panel.result(row, row_block);
            for (int64_t index = panel.first_block; index < panel.last_block; ++index) {
                const ColumnBlock& block = rows.blocks[index];
                const OutputBlock& output = panel.output(row_block, index);
                for (int word = 0; word < rows.rounding.words; ++word) {
                    int32_t dots[kLanes] = {0};
                    dot_tiles(rows, rows.row(row, block) + word * kTileBytes, panel.tile(row_block, block),
                              rows.steps(block), dots);
                    const float scale = rows.row_block(row, index)[word].scale;
                    for (int lane = 0; lane < kLanes; ++lane) {
                        const float value = static_cast<float>(dots[lane]) * scale;
                        result[lane] = std::fma(value, output.scales[lane], result[lane]);
                    }
                }
            }
        }
    }
}

void store_panel(const ActivationTiles& rows, const Panel& panel, const OutputRows& output) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        for (int64_t i = 0; i < panel.row_blocks; ++i) {
            store_lanes(panel.result(row, i), *panel.weight, output, row, panel.first_row_block + i);
        }
    }
}

void multiply_tiles(const PackedWeight& weight, const ActivationTiles& tiles, const OutputRows& output, int64_t begin,
                    int64_t end) {
    multiply_panels({multiply_outliers, unpack_panel, multiply_panel, store_panel}, weight, tiles, output, begin, end);
}

// ---- dequantization -----------------------------------------------------------------------------------------------

void dequantize(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end) {
    const int64_t last = end * kLanes < weight.out_features ? end * kLanes : weight.out_features;
    for (int64_t row = begin * kLanes; row < last; ++row) {
        const int64_t row_block = row / kLanes, lane = row % kLanes;
        const int64_t out = (row - begin * kLanes) * weight.in_features;
        for (int64_t column = 0; column < weight.in_features; ++column) {
            const int64_t group = column / weight.group_size;
            const int64_t parameters = (row_block * weight.groups + group) * kLanes + lane;
            const uint32_t* words = weight.unit(row_block, column / kUnitColumns) + lane;
            const int code = static_cast<int>(decode(words, weight.bits, static_cast<int>(column % kUnitColumns)));
            const float centred = static_cast<float>(code - weight.zeros[parameters]);
            store_float(dense, dtype, out + column, centred * half_to_float(weight.scales[parameters]));
        }
    }
}

}  // namespace

const Kernels portable_kernels = {kFewRows,        no_digit_tiles, prepare,         multiply,
                                  element,         prepare_tiles,  multiply_tiles,  dequantize,
                                  &portable_block, true,           &portable_search};

}  // namespace autoq::cpu
