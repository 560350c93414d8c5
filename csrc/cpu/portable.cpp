// The kernels in plain C++: what every processor can run, and the plainest statement of what the others compute.
#include <cmath>

#include "kernels.h"

namespace autoq::cpu {
namespace {

uint32_t magnitude_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits & 0x7fffffffu;
}

// One value, cut into digits, least significant first. The bound on the value leaves nothing for digits behind the
// last.
void split_digits(int32_t value, int8_t (&digits)[kMaxDigits]) {
    for (int8_t& digit : digits) {
        digit = static_cast<int8_t>(value);
        value = (value - digit) >> 8;
    }
}

void prepare_block(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t row,
                   int64_t block, int64_t begin, int64_t end) {
    const auto value_at = [&](int64_t column) {
        return column < weight.in_features ? load_float(input.data, input.dtype, row * weight.in_features + column)
                                           : 0.0f;
    };
    uint32_t largest = 0;
    for (int64_t column = begin * kHalfColumns; column < end * kHalfColumns; ++column) {
        const uint32_t bits = magnitude_bits(value_at(column));
        largest = bits > largest ? bits : largest;
    }
    const BlockScale scale = block_scale(largest, fixed.digits);
    int32_t sums[kMaxDigits] = {0};
    for (int64_t half = begin; half < end; ++half) {
        int8_t* out = fixed.half(row, half);
        for (int position = 0; position < kHalfColumns; ++position) {
            const float value = value_at(half * kHalfColumns + column_of(weight.bits, position));
            int8_t digits[kMaxDigits] = {0};
            if (scale.to_integer > 0.0f) {
                split_digits(static_cast<int32_t>(std::lrint(value * scale.to_integer)), digits);
            }
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
    const int64_t halves = weight.group_halves();
    for (int64_t row = begin; row < end; ++row) {
        int64_t block = 0;
        for (int64_t group = 0; group < weight.groups; ++group) {
            for (int64_t half = 0; half < halves; half += kBlockHalves, ++block) {
                const int64_t stop = half + kBlockHalves < halves ? half + kBlockHalves : halves;
                prepare_block(weight, input, fixed, row, block, group * halves + half, group * halves + stop);
            }
        }
    }
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
    const int64_t halves = weight.group_halves();
    int64_t block = row * fixed.blocks;
    for (int64_t group = 0; group < weight.groups; ++group) {
        const int64_t parameters = (row_block * weight.groups + group) * kLanes;
        for (int64_t half = 0; half < halves; half += kBlockHalves, ++block) {
            const int64_t stop = half + kBlockHalves < halves ? half + kBlockHalves : halves;
            int32_t dots[kMaxDigits][kLanes] = {{0}};
            dot_block(weight, fixed, row, row_block, group * halves + half, group * halves + stop, dots);
            for (int lane = 0; lane < kLanes; ++lane) {
                const float zero = weight.zeros[parameters + lane];
                const float scale = half_to_float(weight.scales[parameters + lane]);
                const float value =
                    combine_digits(&dots[0][lane], kLanes, fixed.sums + block * fixed.digits, zero, fixed.digits);
                result[lane] += scale * (value * fixed.scales[block]);
            }
        }
    }
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

const Kernels portable_kernels = {prepare, multiply, dequantize};

}  // namespace autoq::cpu
