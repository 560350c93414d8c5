// How many digits the fixed-point form of a row gets (fixed_point.h); it depends on nothing but the row. Compiled for
// the baseline, so that it is the same on all instruction sets.
//
// Two digits round what lies below the last bit of the largest value of a block, three next to nothing. Two are enough
// where the error to be expected is at most an eighth of the dtype's epsilon, relative to the magnitudes of the row: a
// value that comes as bf16 or fp16 carries an error of about a fifth of epsilon itself. The magnitude of a block is the
// mean without the largest value, because a few outliers should not vouch for the others, whose weights may be the
// larger ones. Of the inputs of trained models' linears, in bf16, fewer than one row in a hundred takes three digits,
// even where the values are products of two (a gated activation); of fp16's, which has eight times the precision, such
// products mostly do.
#pragma once

#include <algorithm>
#include <bit>

#include "dispatch.h"

namespace autoq::cpu {

constexpr int kPairs = 4;
using Pairs = uint32_t __attribute__((vector_size(4 * kPairs)));
using Floats = float __attribute__((vector_size(4 * kPairs)));

// A 16-bit float's bits but for the sign; they are ordered as the magnitudes are.
inline int16_t magnitude_bits(int16_t bits) { return static_cast<int16_t>(bits & 0x7fff); }

// The magnitudes of the upper halves of words, or of words of which the lower halves are zero, in fp32.
template <Float DTYPE>
Floats magnitudes(Pairs words) {
    words &= 0x7fff0000u;
    if constexpr (DTYPE == Float::kBFloat16) return reinterpret_cast<Floats>(words);
    return reinterpret_cast<Floats>(words >> 3) * 0x1p112f;  // the difference of the exponents' biases
}

template <Float DTYPE>
float sum_of_magnitudes(const int16_t* values, int64_t count) {
    Floats sums{};
    const auto add = [&](const int16_t* some, size_t bytes) {
        Pairs words{};
        std::memcpy(&words, some, bytes);
        sums += magnitudes<DTYPE>(words) + magnitudes<DTYPE>(words << 16);
    };
    int64_t i = 0;
    for (; i + 2 * kPairs <= count; i += 2 * kPairs) add(values + i, sizeof(Pairs));
    if (i < count) add(values + i, 2 * (count - i));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What two digits do to a block: the sum of the squared errors to be expected, and of the typical magnitudes squared.
struct RoundingOfTwo {
    double errors, values;
};

template <Float DTYPE>
RoundingOfTwo rounding_of_two_digits(const int16_t* values, int64_t count) {
    constexpr int kMantissaBits = DTYPE == Float::kBFloat16 ? 7 : 10;
    int16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude_bits(values[i]));
    const float largest_value = magnitudes<DTYPE>(Pairs{} + (static_cast<uint32_t>(largest) << 16))[0];

    // Values of which the last bit is not below the step are exact.
    const double step = block_scale(std::bit_cast<uint32_t>(largest_value), digit_fraction_bits(2)).to_float;
    const int exponents = digit_fraction_bits(2) - 1 - kMantissaBits;
    const auto exact = static_cast<int16_t>(((largest >> kMantissaBits) - exponents) * (1 << kMantissaBits));
    int16_t rounded = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int16_t magnitude = magnitude_bits(values[i]);
        rounded = static_cast<int16_t>(rounded + (magnitude != 0 && magnitude < exact));
    }
    const double others = sum_of_magnitudes<DTYPE>(values, count) - largest_value;
    return {rounded * step * step / 12, others * others / static_cast<double>(count)};
}

template <Float DTYPE>
int digits_of_16_bits(const PackedWeight& weight, const InputRows& input, int64_t row) {
    const int16_t* values = static_cast<const int16_t*>(input.data) + row * weight.in_features;
    RoundingOfTwo total{};
    for_each_block(weight, kBlockHalves, [&](int64_t, int64_t, int64_t first, int64_t last) {
        const int64_t begin = first * kHalfColumns, end = std::min(last * kHalfColumns, weight.in_features);
        if (begin >= end) return;  // padding
        const RoundingOfTwo block = rounding_of_two_digits<DTYPE>(values + begin, end - begin);
        total.errors += block.errors;
        total.values += block.values;
    });
    constexpr double kEpsilon = DTYPE == Float::kBFloat16 ? 0x1p-7 : 0x1p-10;
    constexpr double kAllowed = kEpsilon / 8;
    return total.errors <= kAllowed * kAllowed * total.values ? 2 : 3;
}

inline int digits_for_row(const PackedWeight& weight, const InputRows& input, int64_t row) {
    switch (input.dtype) {
        case Float::kFloat32:
            return 4;
        case Float::kBFloat16:
            return digits_of_16_bits<Float::kBFloat16>(weight, input, row);
        default:
            return digits_of_16_bits<Float::kFloat16>(weight, input, row);
    }
}

}  // namespace autoq::cpu
