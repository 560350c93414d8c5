// The kernels for AVX2, with FMA and F16C. One register holds the same columns of 8 output rows, half a block.
#if defined(__x86_64__)

#include "dispatch.h"
#include "intrinsics.h"

#define AUTOQ_TARGET __attribute__((target("avx2,fma,f16c")))
#define AUTOQ_INLINE AUTOQ_TARGET __attribute__((always_inline)) inline

namespace autoq::cpu {
namespace {

constexpr int kWidth = 8;

AUTOQ_INLINE __m256 load_eight(const void* data, Float dtype, int64_t index) {
    if (dtype == Float::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
    const uint16_t* address = static_cast<const uint16_t*>(data) + index;
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address));
    if (dtype == Float::kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Eight values as fp32; at most `count` are read, the others are zero.
AUTOQ_INLINE __m256 load_values(const void* data, Float dtype, int64_t index, int64_t count) {
    if (count >= kWidth) return load_eight(data, dtype, index);
    alignas(32) float values[kWidth] = {0};
    for (int64_t i = 0; i < count; ++i) values[i] = load_float(data, dtype, index + i);
    return _mm256_load_ps(values);
}

AUTOQ_INLINE void store_eight(void* data, Float dtype, int64_t index, __m256 values) {
    if (dtype == Float::kFloat32) return _mm256_storeu_ps(static_cast<float*>(data) + index, values);
    __m128i* address = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + index);
    if (dtype == Float::kFloat16) {
        return _mm_storeu_si128(address, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    }
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(address, _mm256_castsi256_si128(packed));
}

AUTOQ_INLINE void store_values(void* data, Float dtype, int64_t index, int64_t count, __m256 values) {
    if (count >= kWidth) return store_eight(data, dtype, index, values);
    alignas(32) float lanes[kWidth];
    _mm256_store_ps(lanes, values);
    for (int64_t i = 0; i < count; ++i) store_float(data, dtype, index + i, lanes[i]);
}

// Eight outputs of a row, from `first` on, with the bias, leaving out the padding.
AUTOQ_INLINE void store_results(__m256 result, const PackedWeight& weight, const OutputRows& output, int64_t row,
                                int64_t first) {
    const int64_t count = weight.out_features - first;
    if (output.bias) result = _mm256_add_ps(result, load_values(output.bias, output.dtype, first, count));
    store_values(output.data, output.dtype, row * output.stride + first, count, result);
}

AUTOQ_INLINE __m256i load_words(const uint32_t* words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// ---- activations -------------------------------------------------------------------------------------------------

AUTOQ_INLINE uint32_t largest_lane(__m256i lanes) {
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

AUTOQ_INLINE float sum_of_lanes(__m128i lanes) {
    lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
    lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1));
    return static_cast<float>(_mm_cvtsi128_si32(lanes));
}

// The low byte of each of sixteen 32-bit lanes, in order.
AUTOQ_INLINE __m128i low_bytes(__m256i first, __m256i second) {
    const __m256i mask = _mm256_set1_epi32(255);
    const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(first, mask), _mm256_and_si256(second, mask));
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
}

// Halves [begin, end) of one input row as fp32. Returns the magnitudes' largest bits.
AUTOQ_INLINE uint32_t load_block(const PackedWeight& weight, const InputRows& input, int64_t row, int64_t begin,
                                 int64_t end, __m256 (&values)[2 * kBlockHalves]) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < 2 * (end - begin); ++i) {
        const int64_t column = begin * kHalfColumns + i * kWidth;
        values[i] =
            load_values(input.data, input.dtype, row * weight.in_features + column, weight.in_features - column);
        const __m256i bits = _mm256_castps_si256(values[i]);
        largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    return largest_lane(largest);
}

template <int DIGITS>
AUTOQ_TARGET void prepare_block(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed,
                                int64_t row, int64_t block, int64_t begin, int64_t end, const int8_t* columns) {
    __m256 values[2 * kBlockHalves];
    const uint32_t largest = load_block(weight, input, row, begin, end, values);
    const BlockScale scale = block_scale(largest, digit_fraction_bits(DIGITS));
    const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
    const __m256 to_integer = _mm256_set1_ps(scale.to_integer);
    const __m256i rounding = _mm256_set1_epi32(128);
    __m128i sums[DIGITS];
    for (int d = 0; d < DIGITS; ++d) sums[d] = _mm_setzero_si128();
    for (int64_t half = begin; half < end; ++half) {
        __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * (half - begin)], to_integer));
        __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * (half - begin) + 1], to_integer));
        int8_t* out = fixed.half(row, half);
        for (int d = 0; d < DIGITS; ++d) {
            const __m128i digit = low_bytes(first, second);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d * kHalfColumns), _mm_shuffle_epi8(digit, order));
            const __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), digit);
            sums[d] = _mm_add_epi32(sums[d], _mm_madd_epi16(pairs, _mm_set1_epi16(1)));
            // (rest - digit) / 256, the digit being the low byte with its sign
            first = _mm256_srai_epi32(_mm256_add_epi32(first, rounding), 8);
            second = _mm256_srai_epi32(_mm256_add_epi32(second, rounding), 8);
        }
    }
    fixed.scales[row * fixed.blocks + block] = scale.to_float;
    for (int d = 0; d < DIGITS; ++d) fixed.sums[(row * fixed.blocks + block) * DIGITS + d] = sum_of_lanes(sums[d]);
}

void prepare(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
             int64_t end) {
    with_digits(fixed.digits,
                [&](auto digits) { prepare_digits(prepare_block<digits>, weight, input, fixed, begin, end); });
}

// ---- multiplication ----------------------------------------------------------------------------------------------

// The codes of one half of a unit (16 columns of 8 rows) as bytes: register p has in each lane the four columns
// `column_of(BITS, 4 * p + byte)`.
template <int BITS>
AUTOQ_INLINE void unpack_half(const uint32_t* codes, int64_t half, __m256i (&out)[4]) {
    if constexpr (BITS == 8) {
        for (int p = 0; p < 4; ++p) out[p] = load_words(codes + (half * 4 + p) * kLanes);
    } else if constexpr (BITS == 4) {
        const __m256i mask = _mm256_set1_epi8(0x0f);
        for (int w = 0; w < 2; ++w) {
            const __m256i word = load_words(codes + (half * 2 + w) * kLanes);
            out[2 * w] = _mm256_and_si256(word, mask);
            out[2 * w + 1] = _mm256_and_si256(_mm256_srli_epi32(word, 4), mask);
        }
    } else if constexpr (BITS == 3) {
        const uint32_t* unit = codes + (half / 2) * BITS * kLanes;
        const __m256i own = load_words(unit + (half % 2) * kLanes), mask = _mm256_set1_epi8(0x07);
        const __m256i shared = _mm256_srli_epi32(load_words(unit + 2 * kLanes), half % 2 == 0 ? 0 : 4);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi32(own, 6), _mm256_set1_epi8(0x03));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi32(shared, 1), _mm256_set1_epi8(0x04));
        out[0] = _mm256_and_si256(own, mask);
        out[1] = _mm256_and_si256(_mm256_srli_epi32(own, 3), mask);
        out[2] = _mm256_and_si256(shared, mask);
        out[3] = _mm256_or_si256(low, high);
    } else {
        const __m256i word = load_words(codes + half * kLanes), mask = _mm256_set1_epi8(0x03);
        for (int p = 0; p < 4; ++p) out[p] = _mm256_and_si256(_mm256_srli_epi32(word, 2 * p), mask);
    }
}

// Sum over four registers of codes of at most 4 bits times digits. The 16-bit sums stay below 4 * 2 * 15 * 128.
AUTOQ_INLINE __m256i dot_pairs(const __m256i (&codes)[4], const int8_t* digits) {
    __m256i pairs = _mm256_setzero_si256();
    for (int p = 0; p < 4; ++p) {
        int32_t four;
        std::memcpy(&four, digits + 4 * p, 4);
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[p], _mm256_set1_epi32(four)));
    }
    return pairs;
}

// Adds one block, the halves [begin, end) of `ROWS` input rows, to the results of 8 outputs.
template <int BITS, int DIGITS, int ROWS>
AUTOQ_INLINE void multiply_block(const uint32_t* codes, const FixedPointRows& fixed, int64_t row, int64_t block,
                                 int64_t begin, int64_t end, __m256 zero, __m256 scale, __m256 (&result)[ROWS]) {
    const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    __m256i dots[ROWS][DIGITS];
    for (auto& of_row : dots)
        for (__m256i& dot : of_row) dot = _mm256_setzero_si256();
    for (int64_t half = begin; half < end; ++half) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + half * BITS * 8) + 2048, _MM_HINT_T0);
        __m256i low[4], high[4];
        unpack_half<BITS>(codes, half, low);
        if constexpr (BITS == 8) {
            // Sums of two products of full bytes do not fit 16 bits: each code is cut into its nibbles.
            for (int p = 0; p < 4; ++p) {
                high[p] = _mm256_and_si256(_mm256_srli_epi32(low[p], 4), nibble);
                low[p] = _mm256_and_si256(low[p], nibble);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const int8_t* digits = fixed.half(row + r, half);
            for (int d = 0; d < DIGITS; ++d) {
                const __m256i pairs = dot_pairs(low, digits + d * kHalfColumns);
                dots[r][d] = _mm256_add_epi32(dots[r][d], _mm256_madd_epi16(pairs, ones));
                if constexpr (BITS == 8) {
                    const __m256i high_pairs = dot_pairs(high, digits + d * kHalfColumns);
                    dots[r][d] = _mm256_add_epi32(dots[r][d], _mm256_madd_epi16(high_pairs, sixteens));
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const int64_t index = (row + r) * fixed.blocks + block;
        __m256 value = _mm256_setzero_ps();
        for (int d = DIGITS - 1; d >= 0; --d) {  // combine_digits
            const __m256 sum = _mm256_set1_ps(fixed.sums[index * DIGITS + d]);
            const __m256 centred = _mm256_fnmadd_ps(zero, sum, _mm256_cvtepi32_ps(dots[r][d]));
            value = _mm256_fmadd_ps(value, _mm256_set1_ps(256.0f), centred);
        }
        value = _mm256_mul_ps(value, _mm256_set1_ps(fixed.scales[index]));
        // Multiplied and added in two roundings, as on processors without fused multiply-add.
        result[r] = _mm256_add_ps(result[r], _mm256_mul_ps(scale, value));
    }
}

// `lanes` is 0 or 8: which half of the row block's 16 outputs.
template <int BITS, int DIGITS, int ROWS>
AUTOQ_TARGET void multiply_tile(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                int64_t row, int64_t row_block, int lanes) {
    const uint32_t* codes = weight.unit(row_block, 0) + lanes;
    const int64_t halves = weight.group_halves();
    __m256 result[ROWS];
    for (__m256& eight : result) eight = _mm256_setzero_ps();
    int64_t block = 0;
    for (int64_t group = 0; group < weight.groups; ++group) {
        const int64_t parameters = (row_block * weight.groups + group) * kLanes + lanes;
        const __m128i zeros = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.zeros + parameters));
        const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(zeros));
        const __m256 scale = load_eight(weight.scales, Float::kFloat16, parameters);
        for (int64_t half = 0; half < halves; half += kBlockHalves, ++block) {
            const int64_t stop = half + kBlockHalves < halves ? half + kBlockHalves : halves;
            multiply_block<BITS, DIGITS, ROWS>(codes, fixed, row, block, group * halves + half, group * halves + stop,
                                               zero, scale, result);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        store_results(result[r], weight, output, row + r, row_block * kLanes + lanes);
    }
}

template <int BITS, int DIGITS>
AUTOQ_TARGET void multiply_blocks(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                  int64_t begin, int64_t end) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        for (int lanes = 0; lanes < kLanes; lanes += kWidth) {
            int64_t row = 0;
            for (; row + 2 <= fixed.rows; row += 2) {
                multiply_tile<BITS, DIGITS, 2>(weight, fixed, output, row, row_block, lanes);
            }
            if (row < fixed.rows) multiply_tile<BITS, DIGITS, 1>(weight, fixed, output, row, row_block, lanes);
        }
    }
}

void multiply(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
              int64_t end) {
    with_bits(weight.bits, [&](auto bits) {
        with_digits(fixed.digits,
                    [&](auto digits) { multiply_blocks<bits, digits>(weight, fixed, output, begin, end); });
    });
}

// ---- many rows: activations ---------------------------------------------------------------------------------------

Element element(Mode, Float, int) { return Element::kWord; }

AUTOQ_INLINE float lowest_lane(__m256 lanes) {
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
}

AUTOQ_INLINE BlockScale tile_scale(const ActivationTiles& tiles, const __m256* values, int64_t halves,
                                   uint32_t largest_magnitude) {
    const BlockScale scale = block_scale(largest_magnitude, tiles.rounding.fraction_bits);
    if (tiles.rounding.mode == Mode::kExact || scale.to_integer == 0.0f) return scale;
    __m256 least = _mm256_setzero_ps(), negated = _mm256_setzero_ps();
    for (int64_t i = 0; i < 2 * halves; ++i) {
        least = _mm256_min_ps(least, values[i]);
        negated = _mm256_min_ps(negated, _mm256_sub_ps(_mm256_setzero_ps(), values[i]));
    }
    const ByteScale byte = byte_scale(lowest_lane(least), -lowest_lane(negated));
    return {byte.to_integer, byte.to_float};
}

AUTOQ_TARGET void prepare_tile_block(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                                     int64_t row, int64_t index, const int32_t* columns) {
    __m256 values[2 * kBlockHalves];
    const ColumnBlock& block = tiles.blocks[index];
    const int64_t halves = block.end - block.begin;
    uint32_t largest = load_block(weight, input, row, block.begin, block.end, values);
    if (tiles.rounding.mode == Mode::kInt8) {
        largest = take_outliers(tiles, row, block, reinterpret_cast<float*>(values), largest);
    }
    const BlockScale scale = tile_scale(tiles, values, halves, largest);
    const __m256 to_integer = _mm256_set1_ps(scale.to_integer);
    uint8_t* out = tiles.row(row, block);
    for (int64_t half = 0; half < halves; ++half) {
        alignas(32) int32_t rest[kHalfColumns];
        for (int i = 0; i < 2; ++i) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(rest + i * kWidth),
                               _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * half + i], to_integer)));
        }
        for (int word = 0; word < tiles.rounding.words; ++word) {
            int16_t words[kHalfColumns];
            for (int i = 0; i < kHalfColumns; ++i) {
                words[i] = static_cast<int16_t>(rest[columns[i]] >> (16 * word));
            }
            std::memcpy(out + tiles.half_offset(half, word), words, sizeof(words));
            // What is left above the low word, which has a sign.
            for (int32_t& value : rest) value += 0x8000;
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

// ---- many rows: multiplication ------------------------------------------------------------------------------------

template <int BITS>
AUTOQ_TARGET void unpack_block(const PackedWeight& weight, const ColumnBlock& block, int64_t row_block, uint8_t* tile,
                               OutputBlock& output) {
    const int64_t parameters = (row_block * weight.groups + block.group) * kLanes;
    for (int lanes = 0; lanes < kLanes; lanes += kWidth) {
        _mm256_store_ps(output.scales + lanes, load_eight(weight.scales, Float::kFloat16, parameters + lanes));
        const __m128i zero_bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.zeros + parameters + lanes));
        __m256i zeros = _mm256_cvtepu8_epi32(zero_bytes);
        zeros = _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 16));
        uint8_t* out = tile + lanes * 4;
        for (int64_t half = block.begin; half < block.end; ++half) {
            __m256i unpacked[4];
            unpack_half<BITS>(weight.unit(row_block, 0) + lanes, half, unpacked);
            for (const __m256i& four : unpacked) {
                const __m256i even = _mm256_and_si256(four, _mm256_set1_epi16(255));
                _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm256_sub_epi16(even, zeros));
                const __m256i odd = _mm256_srli_epi16(four, 8);
                _mm256_store_si256(reinterpret_cast<__m256i*>(out + 64), _mm256_sub_epi16(odd, zeros));
                out += 128;
            }
        }
    }
}

void unpack_panel(const ActivationTiles& rows, const Panel& panel) {
    with_bits(panel.weight->bits, [&](auto bits) { unpack_blocks(unpack_block<bits>, rows, panel); });
}

// As many sums as leave registers for what is added to them.
AUTOQ_TARGET void multiply_outliers(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                                    const OutlierWeights& weights) {
    constexpr int kSums = 8;
    for (int64_t row = 0; row < rows.rows; ++row) {
        const Outlier* outliers = rows.row_outliers(row);
        for (int64_t first = 0; first < kOutlierBlocks * kLanes; first += kSums * kWidth) {
            __m256 sums[kSums];
            for (__m256& sum : sums) sum = _mm256_setzero_ps();
            for (int64_t o = 0; o < rows.outlier_counts[row]; ++o) {
                const float* weight = weights.of_column(outliers[o].column) + first;
                const __m256 value = _mm256_set1_ps(outliers[o].value);
                for (int i = 0; i < kSums; ++i) {
                    sums[i] = _mm256_fmadd_ps(value, _mm256_loadu_ps(weight + i * kWidth), sums[i]);
                }
            }
            for (int i = 0; i < kSums; ++i) {
                const int64_t lane = first + i * kWidth;
                _mm256_store_ps(panel.result(row, row_block + lane / kLanes) + lane % kLanes, sums[i]);
            }
        }
    }
}

// One block of columns for `ROWS` rows and 16 outputs, half of them in a register. Two words of a row are broadcast to
// multiply with two weights of each output.
template <int ROWS>
AUTOQ_INLINE void multiply_block(const ActivationTiles& rows, const uint8_t* values, const uint8_t* weights,
                                 int64_t steps, const RowBlock* of_row, const OutputBlock& output, float* result) {
    __m256i dots[ROWS][2];
    for (auto& of_row : dots)
        for (__m256i& dot : of_row) dot = _mm256_setzero_si256();
    for (; steps > 0; steps -= 16, values += rows.planes * kTileBytes, weights += kTileBytes) {
        const int64_t tile_steps = steps < 16 ? steps : 16;
        for (int64_t step = 0; step < tile_steps; ++step) {
            const __m256i* words = reinterpret_cast<const __m256i*>(weights + step * 64);
            const __m256i low = _mm256_load_si256(words), high = _mm256_load_si256(words + 1);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                int32_t two;
                std::memcpy(&two, values + r * 64 + step * 4, 4);
                const __m256i pair = _mm256_set1_epi32(two);
                dots[r][0] = _mm256_add_epi32(dots[r][0], _mm256_madd_epi16(pair, low));
                dots[r][1] = _mm256_add_epi32(dots[r][1], _mm256_madd_epi16(pair, high));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const __m256 scale = _mm256_set1_ps(of_row[r * rows.rounding.words].scale);
        for (int i = 0; i < 2; ++i) {
            float* eight = result + r * kLanes + i * kWidth;
            const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r][i]), scale);
            const __m256 scales = _mm256_load_ps(output.scales + i * kWidth);
            _mm256_store_ps(eight, _mm256_fmadd_ps(value, scales, _mm256_load_ps(eight)));
        }
    }
}

template <int ROWS>
AUTOQ_TARGET void multiply_rows(const ActivationTiles& rows, const Panel& panel, int64_t row, int64_t row_block) {
    for (int64_t i = panel.first_block; i < panel.last_block; ++i) {
        const ColumnBlock& block = rows.blocks[i];
        const uint8_t* values = rows.row(row, block);
        for (int word = 0; word < rows.rounding.words; ++word) {
            multiply_block<ROWS>(rows, values + word * kTileBytes, panel.tile(row_block, block), rows.steps(block),
                                 rows.row_block(row, i) + word, panel.output(row_block, i),
                                 panel.result(row, row_block));
        }
    }
}

void multiply_panel(const ActivationTiles& rows, const Panel& panel) {
    multiply_four_rows_at_a_time(multiply_rows<4>, multiply_rows<1>, rows, panel);
}

AUTOQ_TARGET void store_panel(const ActivationTiles& rows, const Panel& panel, const OutputRows& output) {
    for (int64_t row = 0; row < rows.rows; ++row) {
        for (int64_t i = 0; i < panel.row_blocks; ++i) {
            for (int lanes = 0; lanes < kLanes; lanes += kWidth) {
                store_results(_mm256_load_ps(panel.result(row, i) + lanes), *panel.weight, output, row,
                              (panel.first_row_block + i) * kLanes + lanes);
            }
        }
    }
}

void multiply_tiles(const PackedWeight& weight, const ActivationTiles& tiles, const OutputRows& output, int64_t begin,
                    int64_t end) {
    multiply_panels({multiply_outliers, unpack_panel, multiply_panel, store_panel}, weight, tiles, output, begin, end);
}

// ---- dequantization ----------------------------------------------------------------------------------------------

// Eight consecutive columns of one row: quarter `part` (0 .. 3) of a unit, `unit` pointing at the row's lane.
template <int BITS>
AUTOQ_INLINE __m256i columns_of_row(const uint32_t* unit, int64_t part) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (BITS == 8) {
        const __m256i first = _mm256_set1_epi32(static_cast<int>(unit[2 * part * kLanes]));
        const __m256i second = _mm256_set1_epi32(static_cast<int>(unit[(2 * part + 1) * kLanes]));
        const __m256i shift = _mm256_slli_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(3)), 3);
        const __m256i words = _mm256_blend_epi32(first, second, 0xf0);
        return _mm256_and_si256(_mm256_srlv_epi32(words, shift), _mm256_set1_epi32(255));
    } else if constexpr (BITS == 4) {
        const __m256i words = _mm256_set1_epi32(static_cast<int>(unit[part * kLanes]));
        return _mm256_and_si256(_mm256_srlv_epi32(words, _mm256_slli_epi32(lane, 2)), _mm256_set1_epi32(15));
    } else if constexpr (BITS == 3) {
        const int64_t half = part / 2, first = part % 2 * 16;
        const __m256i own = _mm256_set1_epi32(static_cast<int>(unit[half * kLanes] >> first));
        const __m256i shared = _mm256_set1_epi32(static_cast<int>(unit[2 * kLanes] >> (first + half * 4)));
        // Of columns 0, 1, 2 and 3 of a byte: where they begin in each word, and which bits are theirs.
        const __m256i own_shift = _mm256_setr_epi32(0, 3, 0, 6, 8, 11, 8, 14);
        const __m256i shared_shift = _mm256_setr_epi32(0, 0, 0, 1, 8, 8, 8, 9);
        const __m256i own_bits = _mm256_setr_epi32(7, 7, 0, 3, 7, 7, 0, 3);
        const __m256i shared_bits = _mm256_setr_epi32(0, 0, 7, 4, 0, 0, 7, 4);
        return _mm256_or_si256(_mm256_and_si256(_mm256_srlv_epi32(own, own_shift), own_bits),
                               _mm256_and_si256(_mm256_srlv_epi32(shared, shared_shift), shared_bits));
    } else {
        const __m256i words = _mm256_set1_epi32(static_cast<int>(unit[(part / 2) * kLanes] >> (part % 2 * 16)));
        return _mm256_and_si256(_mm256_srlv_epi32(words, _mm256_slli_epi32(lane, 1)), _mm256_set1_epi32(3));
    }
}

// One group of one row: halves [begin, end) of the row.
template <int BITS, Float DTYPE>
AUTOQ_INLINE void dequantize_group(const PackedWeight& weight, const uint32_t* row_codes, void* dense, int64_t out,
                                   int64_t begin, int64_t end, float zero, float scale) {
    const __m256 zeros = _mm256_set1_ps(zero), scales = _mm256_set1_ps(scale);
    for (int64_t eight = 2 * begin; eight < 2 * end; ++eight) {
        const int64_t column = eight * kWidth;
        const __m256i code = columns_of_row<BITS>(row_codes + (eight / 4) * BITS * kLanes, eight % 4);
        const __m256 value = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), zeros), scales);
        store_values(dense, DTYPE, out + column, weight.in_features - column, value);
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

void dequantize(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end) {
    with_bits(weight.bits, [&](auto bits) {
        with_dtype(dtype,
                   [&](auto type) { dequantize_blocks(dequantize_rows<bits, type>, weight, dense, begin, end); });
    });
}

}  // namespace

const Kernels avx2_kernels = {kFewRows,       no_digit_tiles, prepare,     multiply, element,     prepare_tiles,
                              multiply_tiles, dequantize,     &avx2_block, true,     &avx2_search};

}  // namespace autoq::cpu

#endif
