// The loops and choices that all instruction sets share. Compiled for the baseline, they call functions compiled for an
// instruction set, each of which does enough at a time for the call not to count.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "outliers.h"
#include "scratch.h"

namespace autoq::cpu {

// Calls `function` with the bits as a constant, `std::integral_constant<int, 2>` and so on.
template <class Function>
void with_bits(int bits, const Function& function) {
    switch (bits) {
        case 2:
            return function(std::integral_constant<int, 2>());
        case 3:
            return function(std::integral_constant<int, 3>());
        case 4:
            return function(std::integral_constant<int, 4>());
        default:
            return function(std::integral_constant<int, 8>());
    }
}

// The same with the number of digits.
template <class Function>
void with_digits(int digits, const Function& function) {
    switch (digits) {
        case 2:
            return function(std::integral_constant<int, 2>());
        case 3:
            return function(std::integral_constant<int, 3>());
        default:
            return function(std::integral_constant<int, 4>());
    }
}

template <class Function>
void with_dtype(Float dtype, const Function& function) {
    switch (dtype) {
        case Float::kFloat32:
            return function(std::integral_constant<Float, Float::kFloat32>());
        case Float::kBFloat16:
            return function(std::integral_constant<Float, Float::kBFloat16>());
        default:
            return function(std::integral_constant<Float, Float::kFloat16>());
    }
}

// Calls `function(block, group, begin, end)` for the blocks of a row in order: halves [begin, end), at most
// `block_halves` of them, all in one group.
template <class Function>
void for_each_block(const PackedWeight& weight, int64_t block_halves, const Function& function) {
    const int64_t halves = weight.group_halves();
    int64_t block = 0;
    for (int64_t group = 0; group < weight.groups; ++group) {
        const int64_t first = group * halves;
        for (int64_t half = 0; half < halves; half += block_halves, ++block) {
            function(block, group, first + half, first + std::min(half + block_halves, halves));
        }
    }
}

// The blocks of columns of tiles, cut into slices.
inline std::vector<ColumnBlock> column_blocks(const PackedWeight& weight, const ActivationTiles& tiles) {
    std::vector<ColumnBlock> blocks;
    ColumnBlock next{};
    size_t first = 0;  // of the slice
    const auto end_slice = [&] {
        for (; first < blocks.size(); ++first) blocks[first].slice_tiles = next.tile;
        next.tiles_before += next.tile;
        next.tile = 0;
    };
    for_each_block(weight, tiles.rounding.block_halves, [&](int64_t, int64_t group, int64_t begin, int64_t end) {
        next.group = group;
        next.begin = begin;
        next.end = end;
        next.tiles = tiles.tiles_of(end - begin);
        if (next.tile + next.tiles > kSliceTiles) end_slice();
        blocks.push_back(next);
        next.tile += next.tiles;
    });
    end_slice();
    return blocks;
}

// Room for the rows in fixed point, to be filled by `prepare`.
inline FixedPointRows fixed_point_rows(const PackedWeight& weight, const InputRows& input, int digits,
                                       const Kernels& kernels, Scratch& scratch) {
    FixedPointRows fixed{};
    fixed.rows = input.rows;
    fixed.digits = digits;
    fixed.halves = weight.units * 2;
    fixed.blocks = weight.groups * blocks_per_group(weight);
    fixed.tile_rows = kernels.digit_tile_rows(fixed.rows, fixed.digits);
    fixed.block_halves = std::min(weight.group_halves(), kBlockHalves);
    const int64_t values = (fixed.value_bytes() + 3) / 4 * 4;
    const int64_t scales = fixed.rows * fixed.blocks;
    char* memory = scratch.get(values + 4 * scales * (1 + fixed.digits));
    fixed.values = reinterpret_cast<int8_t*>(memory);
    fixed.scales = reinterpret_cast<float*>(memory + values);
    fixed.sums = fixed.scales + scales;
    return fixed;
}

// Room for the rows as tiles, to be filled by `prepare_tiles`.
inline ActivationTiles activation_tiles(const PackedWeight& weight, const InputRows& input, Mode mode,
                                        const Kernels& kernels, Scratch& scratch) {
    const Rounding rounding = rounding_of(mode, input.dtype, weight.bits);
    const Element element = kernels.element(mode, input.dtype, weight.bits);
    const bool split = mode == Mode::kExact && element == Element::kByte;
    const int planes = split ? 2 * rounding.words : rounding.words;
    ActivationTiles tiles{};
    tiles.rounding = rounding;
    tiles.element = element;
    tiles.rows = input.rows;
    tiles.planes = planes;
    tiles.blocks = column_blocks(weight, tiles);
    const int64_t bytes = tiles.row_tiles() * tiles.tiles() * planes * kTileBytes;
    const int64_t parameters = tiles.row_tiles() * kTileRows * tiles.block_count() * rounding.words;
    const int64_t outliers = mode == Mode::kInt8 ? input.rows * tiles.block_count() * kBlockOutliers : 0;
    const int64_t parameter_bytes = parameters * static_cast<int64_t>(sizeof(RowBlock));
    const int64_t outlier_bytes = outliers * static_cast<int64_t>(sizeof(Outlier));
    char* memory = scratch.get(bytes + parameter_bytes + outlier_bytes + input.rows * 8 + tiles.columns());
    tiles.values = reinterpret_cast<uint8_t*>(memory);
    tiles.parameters = reinterpret_cast<RowBlock*>(memory += bytes);
    tiles.outliers = reinterpret_cast<Outlier*>(memory += parameter_bytes);
    tiles.outlier_counts = reinterpret_cast<int64_t*>(memory += outlier_bytes);
    tiles.has_outliers = reinterpret_cast<uint8_t*>(memory += input.rows * 8);
    std::memset(tiles.outlier_counts, 0, input.rows * 8 + tiles.columns());
    return tiles;
}

// Few rows: `prepare_block(weight, input, fixed, row, block, begin, end, columns)` writes one block, each half of it
// in the order of `columns`.
template <class PrepareBlock>
void prepare_digits(PrepareBlock prepare_block, const PackedWeight& weight, const InputRows& input,
                    const FixedPointRows& fixed, int64_t begin, int64_t end) {
    int8_t columns[kHalfColumns];
    for (int position = 0; position < kHalfColumns; ++position) columns[position] = column_of(weight.bits, position);
    for (int64_t row = begin; row < end; ++row) {
        for_each_block(weight, kBlockHalves, [&](int64_t block, int64_t, int64_t first, int64_t last) {
            prepare_block(weight, input, fixed, row, block, first, last, columns);
        });
    }
}

// Many rows: the same, `prepare_block(weight, input, tiles, row, block, columns)`.
template <class PrepareBlock>
void prepare_each_tile_block(PrepareBlock prepare_block, const PackedWeight& weight, const InputRows& input,
                             const ActivationTiles& tiles, int64_t begin, int64_t end) {
    int32_t columns[kHalfColumns];
    for (int i = 0; i < kHalfColumns; ++i) columns[i] = column_in_tile(weight.bits, tiles.element, i);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t block = 0; block < tiles.block_count(); ++block) {
            prepare_block(weight, input, tiles, row, block, columns);
        }
    }
}

// `unpack_block(weight, block, row_block, tile, output)` unpacks one block of columns of 16 outputs.
template <class UnpackBlock>
void unpack_blocks(UnpackBlock unpack_block, const ActivationTiles& rows, const Panel& panel) {
    for (int64_t row_block = 0; row_block < panel.row_blocks; ++row_block) {
        for (int64_t block = panel.first_block; block < panel.last_block; ++block) {
            unpack_block(*panel.weight, rows.blocks[block], panel.first_row_block + row_block,
                         panel.tile(row_block, rows.blocks[block]), panel.output(row_block, block));
        }
    }
}

// Which columns have outliers, and which of them each of these is. The vectors are kept for the next call.
struct OutlierColumns {
    std::vector<int32_t> columns, places;
    std::vector<float> weights;

    void find(const ActivationTiles& rows) {
        columns.clear();
        places.resize(rows.columns());
        for (int64_t column = 0; column < rows.columns(); ++column) {
            if (!rows.has_outliers[column]) continue;
            places[column] = static_cast<int32_t>(columns.size());
            columns.push_back(static_cast<int32_t>(column));
        }
        weights.resize(columns.size() * kOutlierBlocks * kLanes);
    }

    // Those of the panel's row blocks from `row_block` on; zeros behind its last.
    template <int BITS>
    void unpack(const Panel& panel, int64_t row_block) {
        for (int64_t i = 0; i < kOutlierBlocks; ++i) {
            if (row_block + i < panel.row_blocks) {
                unpack_row_block<BITS>(*panel.weight, panel.first_row_block + row_block + i, i);
            } else {
                for (size_t c = 0; c < columns.size(); ++c) std::fill_n(at(c, i), kLanes, 0.0f);
            }
        }
    }

  private:
    float* at(size_t column, int64_t row_block) {
        return weights.data() + (static_cast<int64_t>(column) * kOutlierBlocks + row_block) * kLanes;
    }

    template <int BITS>
    void unpack_row_block(const PackedWeight& weight, int64_t row_block, int64_t place) {
        float scales[kLanes];
        int32_t zeros[kLanes];
        int64_t group = -1;
        for (size_t c = 0; c < columns.size(); ++c) {
            const int64_t column = columns[c], of_column = weight.groups == 1 ? 0 : column / weight.group_size;
            const int64_t parameters = (row_block * weight.groups + of_column) * kLanes;
            for (int lane = 0; group != of_column && lane < kLanes; ++lane) {
                scales[lane] = half_to_float(weight.scales[parameters + lane]);
                zeros[lane] = weight.zeros[parameters + lane];
            }
            group = of_column;
            const uint32_t* words = weight.unit(row_block, column / kUnitColumns);
            float* out = at(c, place);
            for (int lane = 0; lane < kLanes; ++lane) {
                const auto code = static_cast<int32_t>(decode(words + lane, BITS, column % kUnitColumns));
                out[lane] = static_cast<float>(code - zeros[lane]) * scales[lane];
            }
        }
    }
};

// `dequantize_rows(weight, dense, row_block, rows, group, begin, end, out)` writes halves [begin, end), all in one
// group, of the first `rows` rows of a row block, of which the first begins at element `out` of the dense weight.
template <class DequantizeRows>
void dequantize_blocks(DequantizeRows dequantize_rows, const PackedWeight& weight, void* dense, int64_t begin,
                       int64_t end) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        const int64_t rows = std::min<int64_t>(kLanes, weight.out_features - row_block * kLanes);
        const int64_t out = (row_block - begin) * kLanes * weight.in_features;
        // Steps of at most 256 columns, so that the 16 rows find their interleaved words in the first-level cache.
        for_each_block(weight, kBlockHalves, [&](int64_t, int64_t group, int64_t first, int64_t last) {
            dequantize_rows(weight, dense, row_block, rows, group, first, last, out);
        });
    }
}

// `four` and `one` multiply so many rows, `(rows, panel, row, row_block)`.
template <class MultiplyRows>
void multiply_four_rows_at_a_time(MultiplyRows four, MultiplyRows one, const ActivationTiles& rows,
                                  const Panel& panel) {
    for (int64_t row_block = 0; row_block < panel.row_blocks; ++row_block) {
        int64_t row = 0;
        for (; row + 4 <= rows.rows; row += 4) four(rows, panel, row, row_block);
        for (; row < rows.rows; ++row) one(rows, panel, row, row_block);
    }
}

// What an instruction set brings to the multiplication of many rows.
struct PanelKernels {
    // Begins the results of kOutlierBlocks row blocks, from `row_block` on, with what outliers give.
    void (*multiply_outliers)(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                              const OutlierWeights& weights);
    void (*unpack)(const ActivationTiles& rows, const Panel& panel);    // fills the panel's tiles and outputs
    void (*multiply)(const ActivationTiles& rows, const Panel& panel);  // adds to the panel's results
    void (*store)(const ActivationTiles& rows, const Panel& panel, const OutputRows& output);
};

// The results of a panel before its blocks.
inline void begin_results(const PanelKernels& set, const ActivationTiles& rows, const Panel& panel,
                          OutlierColumns& outliers) {
    if (outliers.columns.empty()) {
        std::memset(panel.results, 0, panel.result_bytes());
        return;
    }
    for (int64_t row_block = 0; row_block < panel.row_blocks; row_block += kOutlierBlocks) {
        with_bits(panel.weight->bits, [&](auto bits) { outliers.unpack<bits>(panel, row_block); });
        set.multiply_outliers(rows, panel, row_block, {outliers.places.data(), outliers.weights.data()});
    }
}

// Multiplies all rows with the weight's row blocks [begin, end), a panel at a time: what is unpacked once is multiplied
// with every row while it lies in the caches.
inline void multiply_panels(const PanelKernels& set, const PackedWeight& weight, const ActivationTiles& rows,
                            const OutputRows& output, int64_t begin, int64_t end) {
    constexpr int64_t kTiles = kPanelBlocks * kSliceTiles;
    static thread_local Scratch scratch;
    static thread_local OutlierColumns outliers;
    outliers.find(rows);
    Panel panel{};
    panel.weight = &weight;
    panel.row_tiles = rows.row_tiles();
    char* memory = scratch.get(kTiles * (kTileBytes + sizeof(OutputBlock)) + panel.result_bytes());
    panel.tiles = reinterpret_cast<uint8_t*>(memory);
    panel.outputs = reinterpret_cast<OutputBlock*>(memory + kTiles * kTileBytes);
    panel.results = reinterpret_cast<float*>(memory + kTiles * (kTileBytes + sizeof(OutputBlock)));
    for (int64_t row_block = begin; row_block < end; row_block += kPanelBlocks) {
        panel.first_row_block = row_block;
        panel.row_blocks = std::min(kPanelBlocks, end - row_block);
        begin_results(set, rows, panel, outliers);
        for (int64_t block = 0; block < rows.block_count(); block = panel.last_block) {
            panel.first_block = block;
            panel.last_block = block + 1;
            while (panel.last_block < rows.block_count() && rows.blocks[panel.last_block].tile > 0) ++panel.last_block;
            set.unpack(rows, panel);
            set.multiply(rows, panel);
        }
        set.store(rows, panel, output);
    }
}

}  // namespace autoq::cpu
