// The kernels for AVX-512 with VNNI. One register holds the same columns of 16 output rows.
#if defined(__x86_64__)

#include "avx512.h"

#include "dispatch.h"

#define AUTOQ_TARGET AUTOQ_AVX512
#define AUTOQ_INLINE AUTOQ_AVX512_INLINE

namespace autoq::cpu {
namespace {

// ---- activations -------------------------------------------------------------------------------------------------

AUTOQ_INLINE float sum_of_lanes(__m128i lanes) {
    lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
    lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1));
    return static_cast<float>(_mm_cvtsi128_si32(lanes));
}

// Halves [begin, end) of one input row as fp32. Returns the magnitudes' largest bits.
AUTOQ_INLINE uint32_t load_block(const PackedWeight& weight, const InputRows& input, int64_t row, int64_t begin,
                                 int64_t end, __m512 (&values)[kBlockHalves]) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t half = begin; half < end; ++half) {
        const int64_t column = half * kHalfColumns;
        const __m512 value = load_values(input.data, input.dtype, row * weight.in_features + column,
                                         first_lanes(weight.in_features - column));
        const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
        largest = _mm512_max_epu32(largest, magnitude);
        values[half - begin] = value;
    }
    return _mm512_reduce_max_epu32(largest);
}

// `TILES`: for matrix units.
template <int DIGITS, bool TILES>
AUTOQ_TARGET void prepare_block(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed,
                                int64_t row, int64_t block, int64_t begin, int64_t end, const int8_t* columns) {
    __m512 values[kBlockHalves];
    const uint32_t largest = load_block(weight, input, row, begin, end, values);
    const BlockScale scale = block_scale(largest, digit_fraction_bits(DIGITS));
    const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
    const __m512 to_integer = _mm512_set1_ps(scale.to_integer);
    __m128i sums[DIGITS];
    for (int d = 0; d < DIGITS; ++d) sums[d] = _mm_setzero_si128();
    for (int64_t half = begin; half < end; ++half) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(values[half - begin], to_integer));
        int8_t* out = TILES ? fixed.half_in_tile(row, block, half - begin) : fixed.half(row, half);
        for (int d = 0; d < DIGITS; ++d, out += TILES ? kTileColumns : kHalfColumns) {
            const __m128i digit = _mm512_cvtepi32_epi8(rest);  // the low bytes
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(digit, order));
            sums[d] = _mm_dpbusd_epi32(sums[d], _mm_set1_epi8(1), digit);
            // (rest - digit) / 256, the digit being the low byte with its sign
            rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
        }
    }
    if constexpr (TILES) {
        for (int64_t half = end - begin; half % kTileHalves != 0; ++half) {
            int8_t* out = fixed.half_in_tile(row, block, half);
            for (int d = 0; d < DIGITS; ++d, out += kTileColumns) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_setzero_si128());
            }
        }
    }
    fixed.scales[row * fixed.blocks + block] = scale.to_float;
    for (int d = 0; d < DIGITS; ++d) fixed.sums[(row * fixed.blocks + block) * DIGITS + d] = sum_of_lanes(sums[d]);
}

// ---- multiplication ----------------------------------------------------------------------------------------------

// Adds to each of 16 sums the products of four codes with the same four digits, which the instruction reads from
// memory. GCC would copy every sum to another register and back.
AUTOQ_INLINE void add_products(__m512i& sums, __m512i codes, const int8_t* digits) {
    using Four = int8_t[4];
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const Four*>(digits)));
}

// Adds one block, the halves [begin, end) of `ROWS` input rows, to the results of 16 outputs.
template <int BITS, int DIGITS, int ROWS>
AUTOQ_INLINE void multiply_block(const uint32_t* codes, const FixedPointRows& fixed, int64_t row, int64_t block,
                                 int64_t begin, int64_t end, __m512 zero, __m512 scale, __m512 (&result)[ROWS]) {
    // An accumulator can take one dot product every five cycles; with few rows, several in turn keep the vector units
    // busy. Integer sums are exact, so their number does not change the result. The odd ones are of shifted codes.
    constexpr int kSets = ROWS == 1 ? 4 : 2;
    __m512i dots[ROWS][DIGITS][kSets];
    for (auto& of_row : dots)
        for (auto& of_digit : of_row)
            for (__m512i& dot : of_digit) dot = _mm512_setzero_si512();
    const int8_t* digits[ROWS];
    for (int r = 0; r < ROWS; ++r) digits[r] = fixed.half(row + r, begin);
    for (int64_t half = begin; half < end; ++half) {
        __m512i unpacked[4];
        prefetch_half<BITS>(codes, half);
        unpack_half<BITS, true>(codes, half, unpacked);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
                for (int d = 0; d < DIGITS; ++d) {
                    add_products(dots[r][d][p % kSets], unpacked[p], digits[r] + d * kHalfColumns + 4 * p);
                }
            }
        }
        for (const int8_t*& of_row : digits) of_row += DIGITS * kHalfColumns;
    }
    for (int r = 0; r < ROWS; ++r) {
        __m512i sums[DIGITS];
        for (int d = 0; d < DIGITS; ++d) {
            __m512i even = dots[r][d][0], odd = dots[r][d][1];
            if constexpr (kSets == 4) {
                even = _mm512_add_epi32(even, dots[r][d][2]);
                odd = _mm512_add_epi32(odd, dots[r][d][3]);
            }
            sums[d] = _mm512_add_epi32(even, _mm512_srai_epi32(odd, odd_shift(BITS)));
        }
        result[r] = add_digits<DIGITS>(result[r], sums, fixed, (row + r) * fixed.blocks + block, zero, scale);
    }
}

template <int BITS, int DIGITS, int ROWS>
AUTOQ_TARGET void multiply_tile(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                int64_t row, int64_t row_block) {
    const uint32_t* codes = weight.unit(row_block, 0);
    const int64_t halves = weight.group_halves();
    __m512 result[ROWS];
    for (__m512& lanes : result) lanes = _mm512_setzero_ps();
    int64_t block = 0;
    for (int64_t group = 0; group < weight.groups; ++group) {
        const __m512 zero = load_zeros(weight, row_block, group), scale = load_scales(weight, row_block, group);
        for (int64_t half = 0; half < halves; half += kBlockHalves, ++block) {
            const int64_t stop = half + kBlockHalves < halves ? half + kBlockHalves : halves;
            multiply_block<BITS, DIGITS, ROWS>(codes, fixed, row, block, group * halves + half, group * halves + stop,
                                               zero, scale, result);
        }
    }
    for (int r = 0; r < ROWS; ++r) store_results(result[r], weight, output, row + r, row_block);
}

template <int BITS, int DIGITS>
AUTOQ_TARGET void multiply_blocks(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                  int64_t begin, int64_t end) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        int64_t row = 0;
        for (; row + 4 <= fixed.rows; row += 4) multiply_tile<BITS, DIGITS, 4>(weight, fixed, output, row, row_block);
        if (row + 2 <= fixed.rows) {
            multiply_tile<BITS, DIGITS, 2>(weight, fixed, output, row, row_block);
            row += 2;
        }
        if (row < fixed.rows) multiply_tile<BITS, DIGITS, 1>(weight, fixed, output, row, row_block);
    }
}

// ---- many rows: activations ---------------------------------------------------------------------------------------

Element element(Mode mode, Float, int) { return mode == Mode::kExact ? Element::kWord : Element::kByte; }

// What makes the values of a block integers.
struct TileScale {
    float to_integer, to_float;
    int32_t zero_point;
};

AUTOQ_INLINE TileScale tile_scale(const ActivationTiles& tiles, const __m512* values, int64_t halves,
                                  uint32_t largest_magnitude) {
    const BlockScale scale = block_scale(largest_magnitude, tiles.rounding.fraction_bits);
    if (tiles.rounding.mode == Mode::kExact || scale.to_integer == 0.0f) return {scale.to_integer, scale.to_float, 0};
    __m512 least = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int64_t half = 0; half < halves; ++half) {
        least = _mm512_min_ps(least, values[half]);
        largest = _mm512_max_ps(largest, values[half]);
    }
    const ByteScale byte = byte_scale(_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(largest));
    return {byte.to_integer, byte.to_float, byte.zero_point};
}

AUTOQ_INLINE void store_bytes(uint8_t* out, __m512i values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(values));
}

AUTOQ_TARGET void prepare_tile_block(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                                     int64_t row, int64_t index, const int32_t* columns) {
    __m512 values[kBlockHalves];
    const ColumnBlock& block = tiles.blocks[index];
    const int64_t halves = block.end - block.begin;
    uint32_t largest = load_block(weight, input, row, block.begin, block.end, values);
    if (tiles.rounding.mode == Mode::kInt8) {
        largest = take_outliers(tiles, row, block, reinterpret_cast<float*>(values), largest);
    }
    const TileScale scale = tile_scale(tiles, values, halves, largest);
    const __m512i order = _mm512_loadu_si512(columns), zero_point = _mm512_set1_epi32(scale.zero_point);
    __m512i sums[kMaxWords] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    uint8_t* out = tiles.row(row, block);
    for (int64_t half = 0; half < halves; ++half) {
        const __m512 scaled = _mm512_mul_ps(values[half], _mm512_set1_ps(scale.to_integer));
        __m512i rest = _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32(scaled));
        for (int word = 0; word < tiles.rounding.words; ++word) {
            sums[word] = _mm512_add_epi32(sums[word], _mm512_srai_epi32(_mm512_slli_epi32(rest, 16), 16));
            if (tiles.element == Element::kBFloat16) {
                const __m512 rounded = _mm512_mul_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(scale.to_float));
                const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(rounded), 16);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tiles.half_offset(half, word)),
                                    _mm512_cvtepi32_epi16(bits));
            } else if (tiles.element == Element::kWord) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tiles.half_offset(half, word)),
                                    _mm512_cvtepi32_epi16(rest));
            } else if (tiles.rounding.mode == Mode::kExact) {
                store_bytes(out + tiles.half_offset(half, 2 * word), rest);
                store_bytes(out + tiles.half_offset(half, 2 * word + 1), _mm512_srli_epi32(rest, 8));
            } else {
                store_bytes(out + tiles.half_offset(half, word), _mm512_add_epi32(rest, zero_point));
            }
            // (rest - word) / 65536, the word being the low half with its sign
            rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(0x8000)), 16);
        }
    }
    if (tiles.element == Element::kBFloat16 && halves % 2 == 1) {
        // What is multiplied by the zeros that fill a tile must not be NaN.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tiles.half_offset(halves, 0)), _mm256_setzero_si256());
    }
    RowBlock* parameters = tiles.row_block(row, index);
    const float zero = static_cast<float>(scale.zero_point);
    parameters[0] = {scale.to_float, zero, _mm512_reduce_add_epi32(sums[0])};
    if (tiles.rounding.words == 2) parameters[1] = {scale.to_float * 65536.0f, zero, _mm512_reduce_add_epi32(sums[1])};
}

// ---- many rows: multiplication ------------------------------------------------------------------------------------

// The integers from -16 to 15 as bf16, to be looked up by their low five bits.
AUTOQ_INLINE __m512i signed_integers_as_bf16() {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
        const float value = static_cast<float>(i < 16 ? i : i - 32);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        table[i] = static_cast<uint16_t>(bits >> 16);
    }
    return _mm512_load_si512(table);
}

// One block of columns of 16 outputs as tiles.
template <int BITS, Element ELEMENT>
AUTOQ_TARGET void unpack_block(const PackedWeight& weight, const ColumnBlock& block, int64_t row_block, uint8_t* tile,
                               OutputBlock& output) {
    const uint32_t* codes = weight.unit(row_block, 0);
    const int64_t parameters = (row_block * weight.groups + block.group) * kLanes;
    const __m128i zero_bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.zeros + parameters));
    const __m512i zeros = _mm512_cvtepu8_epi32(zero_bytes);
    _mm512_store_ps(output.scales, load_values(weight.scales, Float::kFloat16, parameters, 0xffff));
    // What is subtracted from every code: its zero, except that differences of 8-bit codes need nine bits.
    constexpr bool kShifted = ELEMENT == Element::kByte && BITS == 8;
    __m512i centre = kShifted ? _mm512_set1_epi32(128) : zeros;
    if (kShifted) _mm512_store_si512(output.shifts, _mm512_sub_epi32(centre, zeros));
    centre = _mm512_or_si512(centre, _mm512_slli_epi32(centre, 16));
    if (ELEMENT == Element::kByte) centre = _mm512_or_si512(centre, _mm512_slli_epi32(centre, 8));
    const __m512i table = signed_integers_as_bf16();
    __m512i sums = _mm512_setzero_si512();
    for (int64_t half = block.begin; half < block.end; ++half) {
        __m512i unpacked[4];
        prefetch_half<BITS>(codes, half);
        unpack_half<BITS>(codes, half, unpacked);
        for (const __m512i& four : unpacked) {
            if constexpr (ELEMENT == Element::kByte) {
                const __m512i bytes = _mm512_sub_epi8(four, centre);
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), bytes);
                _mm512_store_si512(tile, bytes);
            } else {
                __m512i even = _mm512_sub_epi16(_mm512_and_si512(four, _mm512_set1_epi16(255)), centre);
                __m512i odd = _mm512_sub_epi16(_mm512_srli_epi16(four, 8), centre);
                if constexpr (ELEMENT == Element::kBFloat16) {
                    even = _mm512_permutexvar_epi16(even, table);
                    odd = _mm512_permutexvar_epi16(odd, table);
                }
                _mm512_store_si512(tile, even);
                tile += 64;
                _mm512_store_si512(tile, odd);
            }
            tile += 64;
        }
    }
    if constexpr (ELEMENT == Element::kByte) _mm512_store_ps(output.sums, _mm512_cvtepi32_ps(sums));
    if constexpr (ELEMENT != Element::kWord) {
        int64_t rows = (block.end - block.begin) * (ELEMENT == Element::kByte ? 4 : 8);
        // Matrix units multiply whole tiles.
        for (; rows % kTileRows != 0; ++rows, tile += 64) _mm512_store_si512(tile, _mm512_setzero_si512());
    }
}

// Adds to each of 16 sums the products of two words, or four bytes, of a row with as many weights. As `add_products`,
// assembly for want of a compiler that leaves sums where they are.
template <Element ELEMENT>
AUTOQ_INLINE void add_tile_products(__m512i& sums, __m512i of_row, __m512i weights) {
    if constexpr (ELEMENT == Element::kByte) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(of_row), "v"(weights));
    } else {
        asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(of_row), "v"(weights));
    }
}

// The integer sums of a block for `ROWS` rows and 16 * `COLUMNS` outputs. Four bytes of a row, two words or four bytes,
// are broadcast to multiply with as many weights of each of 16 outputs. The eight rows at `next` are asked for: half a
// line in each of a tile's sixteen steps.
template <Element ELEMENT, int ROWS, int COLUMNS>
AUTOQ_INLINE void dot_tiles(const uint8_t* values, const uint8_t* next, int64_t value_tile, const uint8_t* weights,
                            int64_t steps, __m512i (&dots)[ROWS][COLUMNS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) dots[r][c] = _mm512_setzero_si512();
    for (; steps > 0; steps -= 16, values += value_tile, next += value_tile, weights += kTileBytes) {
        const int64_t tile_steps = steps < 16 ? steps : 16;
        for (int64_t step = 0; step < tile_steps; ++step) {
            __m512i four[COLUMNS];
            if constexpr (ROWS == 8) _mm_prefetch(next + step * 32, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; ++c) {
                four[c] = _mm512_load_si512(weights + c * kSliceTiles * kTileBytes + step * 64);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                int32_t of_row;
                std::memcpy(&of_row, values + r * 64 + step * 4, 4);
                const __m512i broadcast = _mm512_set1_epi32(of_row);
#pragma GCC unroll 2
                for (int c = 0; c < COLUMNS; ++c) add_tile_products<ELEMENT>(dots[r][c], broadcast, four[c]);
            }
        }
    }
}

// What the weights in the tiles lack of their differences from the zeros; `words` from one row's parameters to the
// next.
template <int ROWS, int COLUMNS>
AUTOQ_INLINE void add_shifts(__m512i (&dots)[ROWS][COLUMNS], const OutputBlock* const (&outputs)[COLUMNS],
                             const RowBlock* parameters, int words) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        const __m512i sum = _mm512_set1_epi32(parameters[r * words].sum);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            const __m512i shifts = _mm512_load_si512(outputs[c]->shifts);
            dots[r][c] = _mm512_add_epi32(dots[r][c], _mm512_mullo_epi32(shifts, sum));
        }
    }
}

// The end of a block: adds to the results what its sums give.
template <Element ELEMENT, int ROWS, int COLUMNS>
AUTOQ_INLINE void add_block(const __m512i (&dots)[ROWS][COLUMNS], const OutputBlock* const (&outputs)[COLUMNS],
                            const RowBlock* parameters, int words, float* const (&results)[COLUMNS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        const RowBlock& of_row = parameters[r * words];
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; ++c) {
            __m512 value = _mm512_cvtepi32_ps(dots[r][c]);
            if (ELEMENT == Element::kByte) {
                const __m512 sums = _mm512_load_ps(outputs[c]->sums);
                value = _mm512_fnmadd_ps(_mm512_set1_ps(of_row.zero_point), sums, value);
            }
            value = _mm512_mul_ps(value, _mm512_set1_ps(of_row.scale));
            float* result = results[c] + r * kLanes;
            const __m512 scales = _mm512_load_ps(outputs[c]->scales);
            _mm512_store_ps(result, _mm512_fmadd_ps(value, scales, _mm512_load_ps(result)));
        }
    }
}

template <Element ELEMENT, int ROWS, int COLUMNS>
AUTOQ_TARGET void multiply_rows(const ActivationTiles& rows, const Panel& panel, int64_t row, int64_t row_block) {
    const bool shifted = ELEMENT == Element::kByte && panel.weight->bits == 8;
    const int words = rows.rounding.words;
    const int64_t next_row = row + ROWS < rows.rows ? row + ROWS : 0;
    float* results[COLUMNS];  // of the first row; the others follow it, since they are in one tile
    for (int c = 0; c < COLUMNS; ++c) results[c] = panel.result(row, row_block + c);
    for (int64_t i = panel.first_block; i < panel.last_block; ++i) {
        const ColumnBlock& block = rows.blocks[i];
        const uint8_t* values = rows.row(row, block);
        const uint8_t* next = rows.row(next_row, block);
        const RowBlock* parameters = rows.row_block(row, i);
        const OutputBlock* outputs[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) outputs[c] = &panel.output(row_block + c, i);
        for (int word = 0; word < words; ++word, ++parameters) {
            __m512i dots[ROWS][COLUMNS];
            dot_tiles<ELEMENT>(values + word * kTileBytes, next + word * kTileBytes, rows.planes * kTileBytes,
                               panel.tile(row_block, block), rows.steps(block), dots);
            if (shifted) add_shifts(dots, outputs, parameters, words);
            add_block<ELEMENT>(dots, outputs, parameters, words, results);
        }
    }
}

template <Element ELEMENT, int COLUMNS>
void multiply_columns(const ActivationTiles& rows, const Panel& panel, int64_t row_block) {
    int64_t row = 0;
    for (; row + 8 <= rows.rows; row += 8) multiply_rows<ELEMENT, 8, COLUMNS>(rows, panel, row, row_block);
    for (; row + 3 <= rows.rows && row % 8 <= 5; row += 3) {
        multiply_rows<ELEMENT, 3, COLUMNS>(rows, panel, row, row_block);
    }
    for (; row < rows.rows; ++row) multiply_rows<ELEMENT, 1, COLUMNS>(rows, panel, row, row_block);
}

template <Element ELEMENT>
void multiply_panel(const ActivationTiles& rows, const Panel& panel) {
    int64_t row_block = 0;
    for (; row_block + 2 <= panel.row_blocks; row_block += 2) multiply_columns<ELEMENT, 2>(rows, panel, row_block);
    if (row_block < panel.row_blocks) multiply_columns<ELEMENT, 1>(rows, panel, row_block);
}

void multiply_tiles(const PackedWeight& weight, const ActivationTiles& tiles, const OutputRows& output, int64_t begin,
                    int64_t end) {
    const bool bytes = tiles.element == Element::kByte;
    const auto multiply = bytes ? multiply_panel<Element::kByte> : multiply_panel<Element::kWord>;
    multiply_panels({multiply_outliers_avx512, unpack_panel_avx512, multiply, store_panel_avx512}, weight, tiles,
                    output, begin, end);
}

// ---- dequantization ----------------------------------------------------------------------------------------------

// Sixteen consecutive columns of one row: its words, broadcast to the lanes whose codes they hold, and shifted by each
// lane's amount. `unit` points at the row's lane. What lies above the code in a lane is left there for BITS <= 4.
template <int BITS>
AUTOQ_INLINE __m512i columns_of_row(const uint32_t* unit, int64_t half) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if constexpr (BITS == 8) {
        const uint32_t* word = unit + half * 4 * kLanes;
        __m512i words = _mm512_set1_epi32(word[0]);
        words = _mm512_mask_set1_epi32(words, 0x00f0, word[kLanes]);
        words = _mm512_mask_set1_epi32(words, 0x0f00, word[2 * kLanes]);
        words = _mm512_mask_set1_epi32(words, 0xf000, word[3 * kLanes]);
        const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(3)), 3);
        return _mm512_and_si512(_mm512_srlv_epi32(words, shift), _mm512_set1_epi32(255));
    } else if constexpr (BITS == 4) {
        const uint32_t* word = unit + half * 2 * kLanes;
        const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(word[0]), 0xff00, word[kLanes]);
        const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2);
        return _mm512_srlv_epi32(words, shift);
    } else if constexpr (BITS == 3) {
        const __m512i own = _mm512_set1_epi32(unit[half * kLanes]);
        const __m512i shared = _mm512_set1_epi32(unit[2 * kLanes] >> (half * 4));
        // Of columns 0, 1, 2 and 3 of a byte: where they begin in each word, and which bits are theirs.
        const __m512i byte = _mm512_slli_epi32(_mm512_srli_epi32(lane, 2), 3);
        const __m512i own_shift = _mm512_add_epi32(byte, _mm512_set4_epi32(6, 0, 3, 0));
        const __m512i shared_shift = _mm512_add_epi32(byte, _mm512_set4_epi32(1, 0, 0, 0));
        const __m512i low = _mm512_and_si512(_mm512_srlv_epi32(own, own_shift), _mm512_set4_epi32(3, 0, 7, 7));
        const __m512i high = _mm512_and_si512(_mm512_srlv_epi32(shared, shared_shift), _mm512_set4_epi32(4, 7, 0, 0));
        return _mm512_or_si512(low, high);
    } else {
        return _mm512_srlv_epi32(_mm512_set1_epi32(unit[half * kLanes]), _mm512_slli_epi32(lane, 1));
    }
}

// One group of one row: halves [begin, end) of the row.
template <int BITS, Float DTYPE>
AUTOQ_INLINE void dequantize_group(const PackedWeight& weight, const uint32_t* row_codes, void* dense, int64_t out,
                                   int64_t begin, int64_t end, float zero, float scale) {
    const __m512 zeros = _mm512_set1_ps(zero), scales = _mm512_set1_ps(scale);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // The value of every code, when sixteen entries hold them all: vpermps looks at the low four bits of each lane,
    // so for 2-bit codes, above which other codes remain, the table repeats.
    const __m512i codes = BITS == 2 ? _mm512_and_si512(lane, _mm512_set1_epi32(3)) : lane;
    __m512 table = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zeros), scales);
    if constexpr (DTYPE == Float::kBFloat16) table = _mm512_castsi512_ps(round_to_bf16(table));
    for (int64_t half = begin; half < end; ++half) {
        const uint32_t* unit = row_codes + (half / 2) * BITS * kLanes;
        const __m512i index = columns_of_row<BITS>(unit, half % 2);
        const int64_t column = half * kHalfColumns;
        const __mmask16 mask = first_lanes(weight.in_features - column);
        if constexpr (BITS == 8) {
            const __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(index), zeros), scales);
            store_values(dense, DTYPE, out + column, mask, value);
        } else if constexpr (DTYPE == Float::kBFloat16) {
            const __m512i value = _mm512_castps_si512(_mm512_permutexvar_ps(index, table));
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(dense) + out + column, mask, _mm512_cvtepi32_epi16(value));
        } else {
            store_values(dense, DTYPE, out + column, mask, _mm512_permutexvar_ps(index, table));
        }
    }
}

template <int BITS, Float DTYPE>
AUTOQ_TARGET void dequantize_rows(const PackedWeight& weight, void* dense, int64_t row_block, int64_t rows,
                                  int64_t group, int64_t begin, int64_t end, int64_t out) {
    const int64_t parameters = (row_block * weight.groups + group) * kLanes;
    for (int64_t row = 0; row < rows; ++row) {
        dequantize_group<BITS, DTYPE>(weight, weight.unit(row_block, 0) + row, dense, out + row * weight.in_features,
                                      begin, end, weight.zeros[parameters + row],
                                      _cvtsh_ss(weight.scales[parameters + row]));
    }
}

}  // namespace

void prepare_avx512(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
                    int64_t end) {
    with_digits(fixed.digits, [&](auto digits) {
        const auto prepare = fixed.tile_rows > 0 ? prepare_block<digits, true> : prepare_block<digits, false>;
        prepare_digits(prepare, weight, input, fixed, begin, end);
    });
}

void prepare_tiles_avx512(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                          int64_t begin, int64_t end) {
    prepare_each_tile_block(prepare_tile_block, weight, input, tiles, begin, end);
}

AUTOQ_TARGET void multiply_outliers_avx512(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                                           const OutlierWeights& weights) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        __m512 sums[kOutlierBlocks];
        for (__m512& sum : sums) sum = _mm512_setzero_ps();
        const Outlier* outliers = rows.row_outliers(row);
        for (int64_t o = 0; o < rows.outlier_counts[row]; ++o) {
            const float* weight = weights.of_column(outliers[o].column);
            const __m512 value = _mm512_set1_ps(outliers[o].value);
            for (int64_t i = 0; i < kOutlierBlocks; ++i) {
                sums[i] = _mm512_fmadd_ps(value, _mm512_loadu_ps(weight + i * kLanes), sums[i]);
            }
        }
        for (int64_t i = 0; i < kOutlierBlocks; ++i) _mm512_store_ps(panel.result(row, row_block + i), sums[i]);
    }
}

void unpack_panel_avx512(const ActivationTiles& rows, const Panel& panel) {
    with_bits(panel.weight->bits, [&](auto bits) {
        switch (rows.element) {
            case Element::kByte:
                return unpack_blocks(unpack_block<bits, Element::kByte>, rows, panel);
            case Element::kWord:
                return unpack_blocks(unpack_block<bits, Element::kWord>, rows, panel);
            default:
                return unpack_blocks(unpack_block<bits, Element::kBFloat16>, rows, panel);
        }
    });
}

AUTOQ_TARGET void store_panel_avx512(const ActivationTiles& rows, const Panel& panel, const OutputRows& output) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        for (int64_t i = 0; i < panel.row_blocks; ++i) {
            store_results(_mm512_load_ps(panel.result(row, i)), *panel.weight, output, row, panel.first_row_block + i);
        }
    }
}

void multiply_avx512(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                     int64_t end) {
    with_bits(weight.bits, [&](auto bits) {
        with_digits(fixed.digits,
                    [&](auto digits) { multiply_blocks<bits, digits>(weight, fixed, output, begin, end); });
    });
}

void dequantize_avx512(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end) {
    with_bits(weight.bits, [&](auto bits) {
        with_dtype(dtype,
                   [&](auto type) { dequantize_blocks(dequantize_rows<bits, type>, weight, dense, begin, end); });
    });
}

namespace {

constexpr Kernels with_block(const BlockKernels* block) {
    return {kFewRows,       no_digit_tiles,    prepare_avx512, multiply_avx512, element,       prepare_tiles_avx512,
            multiply_tiles, dequantize_avx512, block,          false,           &avx512_search};
}

}  // namespace

const Kernels avx512_kernels = with_block(&avx512_block);
const Kernels avx512_bf16_kernels = with_block(&avx512_bf16_block);

}  // namespace autoq::cpu

#endif
