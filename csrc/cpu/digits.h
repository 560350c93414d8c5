// How many digits the fixed-point form of a row gets (fixed_point.h); it depends on nothing but the row. Compiled for
// the baseline, so that it is the same on all instruction sets.
//
// Two digits round what lies below the last bit of the largest value of a block, three next to nothing. Two are enough
// where the error to be expected is at most a quarter of the dtype's epsilon, relative to the magnitudes of the row:
// about what its values, which have been rounded to the dtype, carry already. The magnitude of a block is the geometric
// mean, because outliers should not vouch for the others, whose weights may be the larger ones. It is that of the bits,
// as in outliers.h, so it is exact in integers. Of the inputs of trained models' linears, in bf16, one row in twenty
// takes three digits where the values are products of two (a gated activation), and hardly any elsewhere; of fp16's,
// which has eight times the precision, most of these do.
#pragma once

#include <algorithm>

#include "dispatch.h"

namespace autoq::cpu {

// What two digits do to a block: the sum of the squared errors to be expected, and of the magnitudes squared.
struct RoundingOfTwo {
    double errors, values;
};

// For 16-bit floats, whose bits without the sign are ordered as the magnitudes are. Zeros do not count.
inline RoundingOfTwo rounding_of_two_digits(const int16_t* values, int64_t count, Float dtype) {
    int16_t largest = 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto magnitude = static_cast<int16_t>(values[i] & 0x7fff);
        largest = std::max(largest, magnitude);
        sum += magnitude;
    }
    if (sum == 0) return {};

    // Values of which the last bit is not below the step are exact.
    const uint32_t largest_bits = magnitude_bits(load_float(&largest, dtype, 0));
    const double step = block_scale(largest_bits, digit_fraction_bits(2)).to_float;
    const int mantissa_bits = dtype == Float::kBFloat16 ? 7 : 10;
    const int exponents = digit_fraction_bits(2) - 1 - mantissa_bits;
    const auto exact = static_cast<int16_t>(std::max(0, (largest >> mantissa_bits) - exponents) * (1 << mantissa_bits));
    int16_t zeros = 0, rounded = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto magnitude = static_cast<int16_t>(values[i] & 0x7fff);
        zeros = static_cast<int16_t>(zeros + (magnitude == 0));
        rounded = static_cast<int16_t>(rounded + (magnitude < exact));
    }
    if (exact > 0) rounded = static_cast<int16_t>(rounded - zeros);
    const int64_t others = count - zeros;
    const auto mean = static_cast<int16_t>(sum / others);
    const double magnitude = load_float(&mean, dtype, 0);
    return {rounded * step * step / 12, static_cast<double>(others) * magnitude * magnitude};
}

inline int digits_for_row(const PackedWeight& weight, const InputRows& input, int64_t row) {
    if (input.dtype == Float::kFloat32) return 4;
    const int16_t* values = static_cast<const int16_t*>(input.data) + row * weight.in_features;
    RoundingOfTwo total{};
    for_each_block(weight, kBlockHalves, [&](int64_t, int64_t, int64_t first, int64_t last) {
        const int64_t begin = first * kHalfColumns, end = std::min(last * kHalfColumns, weight.in_features);
        if (begin >= end) return;  // padding
        const RoundingOfTwo block = rounding_of_two_digits(values + begin, end - begin, input.dtype);
        total.errors += block.errors;
        total.values += block.values;
    });
    const double allowed = (input.dtype == Float::kBFloat16 ? 0x1p-7 : 0x1p-10) / 4;
    return total.errors <= allowed * allowed * total.values ? 2 : 3;  // three where a value is not finite
}

}  // namespace autoq::cpu
