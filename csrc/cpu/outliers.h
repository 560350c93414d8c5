// Outliers: values so far above the others of their block that eight bits for all would leave the others few.
//
// In mode int8 they are taken out of their blocks, row by row, and multiplied as they are, in fp32:
//
//   result = 0, for each outlier of the row in the order of columns: fma(x[k], (code[k] - zero) * weight scale, result)
//
// and then come the blocks. In language models they are a few channels, the same in most rows, so few weights are
// needed, and they are made fp32 once for all rows. What is an outlier depends on its block alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "tiles.h"

namespace autoq::cpu {

inline uint32_t magnitude_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits & 0x7fffffffu;
}

// Takes the outliers out of the values of a block, leaving zeros, and returns the bits of the largest magnitude left.
// Every sixteenth column has a largest magnitude; outliers are those above eight times the geometric mean of
// these, zeros not counted. The mean is of the bits, which are nearly logarithms, so it is exact in integers. Gaussian
// values have none. A block with more than kBlockOutliers of them is not made for this and is left as it is.
//
// Inlined, to be compiled for each instruction set.
__attribute__((always_inline)) inline uint32_t take_outliers(const ActivationTiles& tiles, int64_t row,
                                                             const ColumnBlock& block, float* values,
                                                             uint32_t largest) {
    constexpr int kDropped = 8;  // low bits, so that sums fit
    constexpr uint32_t kEightTimes = 3u << (23 - kDropped);
    const int64_t count = (block.end - block.begin) * kHalfColumns;
    uint32_t lanes[kHalfColumns] = {0};
    for (int64_t i = 0; i < count; i += kHalfColumns) {
        for (int lane = 0; lane < kHalfColumns; ++lane) {
            lanes[lane] = std::max(lanes[lane], magnitude_bits(values[i + lane]) >> kDropped);
        }
    }
    uint32_t sum = 0, lanes_in_use = 0;
    for (uint32_t lane : lanes) {
        sum += lane;
        lanes_in_use += lane != 0;
    }
    const bool finite = largest < 0x7f800000u;
    if (!finite || lanes_in_use == 0) return largest;
    const uint32_t limit = sum / lanes_in_use + kEightTimes;
    if (largest >> kDropped <= limit) return largest;

    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += magnitude_bits(values[i]) >> kDropped > limit;
    if (found > kBlockOutliers) return largest;
    int64_t& taken = tiles.outlier_counts[row];
    largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = magnitude_bits(values[i]);
        if (magnitude >> kDropped <= limit) {
            largest = std::max(largest, magnitude);
            continue;
        }
        const int64_t column = block.begin * kHalfColumns + i;
        tiles.row_outliers(row)[taken++] = {static_cast<int32_t>(column), values[i]};
        // Threads that prepare other rows may say the same.
        std::atomic_ref<uint8_t>(tiles.has_outliers[column]).store(1, std::memory_order_relaxed);
        values[i] = 0.0f;
    }
    return largest;
}

// Weights of the columns that have outliers, of so many row blocks at a time.
constexpr int64_t kOutlierBlocks = 8;
static_assert(kPanelBlocks % kOutlierBlocks == 0);

struct OutlierWeights {
    const int32_t* places;  // of a column: which of those with outliers it is
    const float* values;    // [columns with outliers][kOutlierBlocks][16]

    const float* of_column(int64_t column) const { return values + places[column] * kOutlierBlocks * kLanes; }
};

}  // namespace autoq::cpu
