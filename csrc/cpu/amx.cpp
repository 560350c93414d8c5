// Many rows on processors with matrix units (Intel AMX). Everything around the products is the AVX-512 kernels'.
//
// An instruction multiplies a tile of 16 rows of activations with one of 16 outputs' weights, 64 columns of bytes or 32
// of bf16, in 16 cycles. Four tiles of sums stay in registers, two of activations times two of weights.
#if defined(__x86_64__)

#include "amx.h"

#include "dispatch.h"

#define AUTOQ_TARGET AUTOQ_AMX
#define AUTOQ_INLINE AUTOQ_AMX __attribute__((always_inline)) inline

namespace autoq::cpu {
namespace {

constexpr int kSums = 4;  // tile registers 0 to 3

struct alignas(64) Sums {
    int32_t of[kSums][kTileRows][kLanes];  // [2 * column + activation]
};

// What a pair of tiles of activations is.
enum class Pair {
    kWord,      // the low (unsigned) and high (signed) bytes of the words of 16 rows
    kByte,      // the bytes of 32 rows, mode int8
    kBFloat16,  // the words of 32 rows as bf16: half the products for an instruction, but one tile of sums, not two,
                // which are results but for the scales of the outputs
};

// What the end of a block needs of 16 outputs. In registers: the results, once written, could be any of it.
template <Pair PAIR, bool SHIFTED>
struct Outputs {
    __m512 scales, sums;
    __m512i shifts;

    Outputs() = default;
    AUTOQ_INLINE explicit Outputs(const OutputBlock& output) : scales(_mm512_load_ps(output.scales)) {
        if constexpr (PAIR == Pair::kByte) sums = _mm512_load_ps(output.sums);
        if constexpr (SHIFTED) shifts = _mm512_load_si512(output.shifts);
    }

    // Adds what a block and word give 16 outputs of one row.
    AUTOQ_INLINE void add(const int32_t* dots, const RowBlock& of_row, float* result) const {
        const __m512 before = _mm512_load_ps(result);
        if constexpr (PAIR == Pair::kBFloat16) {
            _mm512_store_ps(result, _mm512_fmadd_ps(_mm512_load_ps(dots), scales, before));
            return;
        }
        __m512i dot = _mm512_load_si512(dots);
        if constexpr (PAIR == Pair::kWord) {
            const __m512i high = _mm512_load_si512(dots + kTileRows * kLanes);
            dot = _mm512_add_epi32(dot, _mm512_slli_epi32(high, 8));
        }
        if constexpr (SHIFTED) {
            dot = _mm512_add_epi32(dot, _mm512_mullo_epi32(shifts, _mm512_set1_epi32(of_row.sum)));
        }
        __m512 value = _mm512_cvtepi32_ps(dot);
        if constexpr (PAIR == Pair::kByte) value = _mm512_fnmadd_ps(_mm512_set1_ps(of_row.zero_point), sums, value);
        value = _mm512_mul_ps(value, _mm512_set1_ps(of_row.scale));
        _mm512_store_ps(result, _mm512_fmadd_ps(value, scales, before));
    }
};

// The sums of a block and word that are still to be added to the results, row by row of their tiles.
// `SECOND`: there are rows for a second tile of activations. Rows behind the last have memory, and anything in it.
template <Pair PAIR, bool SHIFTED, bool SECOND, int COLUMNS>
class Pending {
  public:
    Pending() = default;
    AUTOQ_INLINE Pending(const ActivationTiles& rows, const Panel& panel, int64_t row, int64_t row_block, int64_t block,
                         int word)
        : of_rows_(rows.row_block(row, block) + word),
          words_(rows.rounding.words),
          second_(rows.block_count() * kTileRows * rows.rounding.words),
          results_(panel.result(row, row_block)),
          next_outputs_(panel.row_tiles * kTileRows * kLanes),
          next_(0) {
        for (int c = 0; c < COLUMNS; ++c) outputs_[c] = Outputs<PAIR, SHIFTED>(panel.output(row_block + c, block));
    }

    // Those of rows before `parts` of `of`.
    AUTOQ_INLINE void add(const Sums& sums, int64_t parts, int64_t of) {
        for (; next_ * of < kTileRows * parts; ++next_) {
#pragma GCC unroll 2
            for (int t = 0; t < (PAIR != Pair::kWord && SECOND ? 2 : 1); ++t) {
                const RowBlock& of_row = of_rows_[next_ * words_ + t * second_];
                float* result = results_ + (t * kTileRows + next_) * kLanes;
#pragma GCC unroll 2
                for (int c = 0; c < COLUMNS; ++c) {
                    outputs_[c].add(sums.of[2 * c + t][next_], of_row, result + c * next_outputs_);
                }
            }
        }
    }
    AUTOQ_INLINE void add_rest(const Sums& sums) { add(sums, 1, 1); }

  private:
    Outputs<PAIR, SHIFTED> outputs_[COLUMNS];
    const RowBlock* of_rows_ = nullptr;
    int64_t words_ = 0, second_ = 0;  // from the parameters of a row to those of the next, and of the second tile
    float* results_ = nullptr;
    int64_t next_outputs_ = 0;
    int64_t next_ = kTileRows;
};

// Tile registers are named by literals: the intrinsics paste them into the instruction's text.
#define AUTOQ_MULTIPLY_TILES(sums, values, weights)              \
    if constexpr (PAIR == Pair::kBFloat16) {                     \
        _tile_dpbf16ps(sums, values, weights);                   \
    } else if constexpr (PAIR == Pair::kWord && (values) == 5) { \
        _tile_dpbssd(sums, values, weights);                     \
    } else {                                                     \
        _tile_dpbusd(sums, values, weights);                     \
    }

// The sums of a block. `values` and `second` are the first tiles of the two of activations; `stride` bytes lie between
// one tile of each and the next. While the matrix unit is at it, the vector units add what is pending, a few rows
// behind each product: in one piece behind them all it would wait for them, and the next products for it.
template <Pair PAIR, bool SHIFTED, bool SECOND, int COLUMNS>
AUTOQ_INLINE void dot_tiles(const uint8_t* values, const uint8_t* second, int64_t stride, const uint8_t* weights,
                            int64_t tiles, Pending<PAIR, SHIFTED, SECOND, COLUMNS>& pending, const Sums& sums) {
    constexpr bool kTwo = PAIR == Pair::kWord || SECOND;
    asm volatile("" ::: "memory");  // GCC does not know that loading tiles reads memory
    _tile_zero(0);
    if constexpr (kTwo) _tile_zero(1);
    if constexpr (COLUMNS == 2) _tile_zero(2);
    if constexpr (kTwo && COLUMNS == 2) _tile_zero(3);
    for (int64_t i = 0; i < tiles; ++i) {
        _tile_loadd(6, weights + i * kTileBytes, 64);
        _tile_loadd(4, values + i * stride, 64);
        AUTOQ_MULTIPLY_TILES(0, 4, 6)
        pending.add(sums, 4 * i + 1, 4 * tiles);
        if constexpr (kTwo) {
            _tile_loadd(5, second + i * stride, 64);
            AUTOQ_MULTIPLY_TILES(1, 5, 6)
        }
        pending.add(sums, 4 * i + 2, 4 * tiles);
        if constexpr (COLUMNS == 2) {
            _tile_loadd(7, weights + (kSliceTiles + i) * kTileBytes, 64);
            AUTOQ_MULTIPLY_TILES(2, 4, 7)
        }
        pending.add(sums, 4 * i + 3, 4 * tiles);
        if constexpr (kTwo && COLUMNS == 2) {
            AUTOQ_MULTIPLY_TILES(3, 5, 7)
        }
        pending.add(sums, 4 * i + 4, 4 * tiles);
    }
}

#undef AUTOQ_MULTIPLY_TILES

template <bool SECOND, int COLUMNS>
AUTOQ_INLINE void store_tiles(Sums& sums) {
    _tile_stored(0, sums.of[0], 64);
    if constexpr (SECOND) _tile_stored(1, sums.of[1], 64);
    if constexpr (COLUMNS == 2) _tile_stored(2, sums.of[2], 64);
    if constexpr (SECOND && COLUMNS == 2) _tile_stored(3, sums.of[3], 64);
    asm volatile("" ::: "memory");  // nor that storing them writes it
}

// Rows [begin, end), two tiles at a time if `SECOND`.
template <Pair PAIR, bool SHIFTED, bool SECOND, int COLUMNS>
AUTOQ_TARGET void multiply_rows(const ActivationTiles& rows, const Panel& panel, int64_t begin, int64_t end,
                                int64_t row_block, Sums& sums) {
    const int64_t stride = rows.planes * kTileBytes;
    Pending<PAIR, SHIFTED, SECOND, COLUMNS> pending;
    for (int64_t row = begin; row < end; row += (SECOND ? 2 : 1) * kTileRows) {
        for (int64_t i = panel.first_block; i < panel.last_block; ++i) {
            const ColumnBlock& block = rows.blocks[i];
            for (int word = 0; word < rows.rounding.words; ++word) {
                const uint8_t* values = rows.row(row, block) + 2 * word * kTileBytes;
                const uint8_t* second = PAIR == Pair::kWord ? values + kTileBytes : values + block.slice_tiles * stride;
                dot_tiles(values, second, stride, panel.tile(row_block, block), block.tiles, pending, sums);
                store_tiles<PAIR == Pair::kWord || SECOND, COLUMNS>(sums);
                pending = {rows, panel, row, row_block, i, word};
            }
        }
    }
    pending.add_rest(sums);
}

template <Pair PAIR, bool SHIFTED, int COLUMNS>
void multiply_columns(const ActivationTiles& rows, const Panel& panel, int64_t row_block, Sums& sums) {
    const int64_t end = rows.row_tiles() * kTileRows;
    const int64_t pairs = PAIR == Pair::kWord ? 0 : end / (2 * kTileRows) * (2 * kTileRows);
    if (pairs > 0) multiply_rows<PAIR, SHIFTED, true, COLUMNS>(rows, panel, 0, pairs, row_block, sums);
    if (pairs < end) multiply_rows<PAIR, SHIFTED, false, COLUMNS>(rows, panel, pairs, end, row_block, sums);
}

template <Pair PAIR, bool SHIFTED>
void multiply_panel(const ActivationTiles& rows, const Panel& panel) {
    Sums sums;
    int64_t row_block = 0;
    for (; row_block + 2 <= panel.row_blocks; row_block += 2) {
        multiply_columns<PAIR, SHIFTED, 2>(rows, panel, row_block, sums);
    }
    if (row_block < panel.row_blocks) multiply_columns<PAIR, SHIFTED, 1>(rows, panel, row_block, sums);
}

// bf16 wherever it holds the words: 150 to 160 cycles for 16 rows, 16 outputs and 128 columns, with everything in the
// caches, where bytes in two planes took 205. The products alone take 86 either way; the rest is putting sums together.
Element element(Mode mode, Float dtype, int bits) {
    const bool fits = mode == Mode::kExact && dtype == Float::kBFloat16 && bits <= 4;
    return fits ? Element::kBFloat16 : Element::kByte;
}

AUTOQ_TARGET void multiply_tiles(const PackedWeight& weight, const ActivationTiles& tiles, const OutputRows& output,
                                 int64_t begin, int64_t end) {
    const bool shifted = weight.bits == 8;
    auto multiply = shifted ? multiply_panel<Pair::kByte, true> : multiply_panel<Pair::kByte, false>;
    if (tiles.element == Element::kBFloat16) {
        multiply = multiply_panel<Pair::kBFloat16, false>;
    } else if (tiles.rounding.mode == Mode::kExact) {
        multiply = shifted ? multiply_panel<Pair::kWord, true> : multiply_panel<Pair::kWord, false>;
    }
    static const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
    multiply_panels({multiply_outliers_avx512, unpack_panel_avx512, multiply, store_panel_avx512}, weight, tiles,
                    output, begin, end);
    _tile_release();  // a thread with tiles in use is slower to switch, and its core to rest
}

}  // namespace

const Kernels amx_kernels = {kFewRowsAmx,          digit_tile_rows_amx, prepare_avx512,    multiply_few_amx,   element,
                             prepare_tiles_avx512, multiply_tiles,      dequantize_avx512, &avx512_bf16_block, true,
                             &avx512_search};

}  // namespace autoq::cpu

#endif
