// What the kernels for AVX-512 and those for processors with matrix units have in common.
#pragma once

#include "ahead.h"
#include "intrinsics.h"
#include "kernels.h"
#include "outliers.h"

#define AUTOQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define AUTOQ_AVX512_INLINE AUTOQ_AVX512 __attribute__((always_inline)) inline

namespace autoq::cpu {

// Few rows.
void prepare_avx512(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
                    int64_t end);
void multiply_avx512(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                     int64_t end);
void dequantize_avx512(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end);

// Many rows, of bytes or words.
void prepare_tiles_avx512(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                          int64_t begin, int64_t end);
void multiply_outliers_avx512(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                              const OutlierWeights& weights);
void unpack_panel_avx512(const ActivationTiles& rows, const Panel& panel);
void store_panel_avx512(const ActivationTiles& rows, const Panel& panel, const OutputRows& output);

// Sixteen values as fp32; those that `mask` leaves out are zero and are not read.
AUTOQ_AVX512_INLINE __m512 load_values(const void* data, Float dtype, int64_t index, __mmask16 mask) {
    if (dtype == Float::kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index);
    if (dtype == Float::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The bf16 nearest to each value, ties to even, in the low half of each lane.
AUTOQ_AVX512_INLINE __m512i round_to_bf16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}

AUTOQ_AVX512_INLINE void store_values(void* data, Float dtype, int64_t index, __mmask16 mask, __m512 values) {
    if (dtype == Float::kFloat32) {
        _mm512_mask_storeu_ps(static_cast<float*>(data) + index, mask, values);
        return;
    }
    const __m256i bits = dtype == Float::kFloat16 ? _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT)
                                                  : _mm512_cvtepi32_epi16(round_to_bf16(values));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + index, mask, bits);
}

AUTOQ_AVX512_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Sixteen outputs of a row, with the bias, leaving out the padding.
AUTOQ_AVX512_INLINE void store_results(__m512 result, const PackedWeight& weight, const OutputRows& output, int64_t row,
                                       int64_t row_block) {
    const int64_t first = row_block * kLanes;
    const __mmask16 mask = first_lanes(weight.out_features - first);
    if (output.bias) result = _mm512_add_ps(result, load_values(output.bias, output.dtype, first, mask));
    store_values(output.data, output.dtype, row * output.stride + first, mask, result);
}

// What the weights of 16 outputs have in a group.
AUTOQ_AVX512_INLINE __m512 load_scales(const PackedWeight& weight, int64_t row_block, int64_t group) {
    return load_values(weight.scales, Float::kFloat16, (row_block * weight.groups + group) * kLanes, 0xffff);
}

AUTOQ_AVX512_INLINE __m512 load_zeros(const PackedWeight& weight, int64_t row_block, int64_t group) {
    const uint8_t* zeros = weight.zeros + (row_block * weight.groups + group) * kLanes;
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros))));
}

// The codes of one half of a unit (16 columns of 16 rows) as bytes: register p has in each lane the four columns
// `column_of(BITS, 4 * p + byte)`.
// `SHIFTED`: those of the odd registers are `odd_shift(BITS)` bits higher, which saves the shifts back.
constexpr int odd_shift(int bits) { return bits == 4 ? 4 : bits == 3 ? 3 : 0; }

template <int BITS, bool SHIFTED = false>
AUTOQ_AVX512_INLINE void unpack_half(const uint32_t* codes, int64_t half, __m512i (&out)[4]) {
    if constexpr (BITS == 8) {
        for (int p = 0; p < 4; ++p) out[p] = _mm512_loadu_si512(codes + (half * 4 + p) * kLanes);
    } else if constexpr (BITS == 4) {
        const __m512i mask = _mm512_set1_epi8(0x0f);
        for (int w = 0; w < 2; ++w) {
            const __m512i word = _mm512_loadu_si512(codes + (half * 2 + w) * kLanes);
            out[2 * w] = _mm512_and_si512(word, mask);
            out[2 * w + 1] =
                SHIFTED ? _mm512_andnot_si512(mask, word) : _mm512_and_si512(_mm512_srli_epi32(word, 4), mask);
        }
    } else if constexpr (BITS == 3) {
        const uint32_t* unit = codes + (half / 2) * BITS * kLanes;
        const __m512i own = _mm512_loadu_si512(unit + (half % 2) * kLanes);
        const __m512i shared = _mm512_srli_epi32(_mm512_loadu_si512(unit + 2 * kLanes), half % 2 == 0 ? 0 : 4);
        const __m512i mask = _mm512_set1_epi8(0x07), high = _mm512_set1_epi8(SHIFTED ? 0x20 : 0x04);
        out[0] = _mm512_and_si512(own, mask);
        out[2] = _mm512_and_si512(shared, mask);
        if constexpr (SHIFTED) {
            out[1] = _mm512_and_si512(own, _mm512_set1_epi8(0x38));
            out[3] = _mm512_and_si512(_mm512_srli_epi32(own, 3), _mm512_set1_epi8(0x18));
            out[3] = _mm512_or_si512(out[3], _mm512_and_si512(_mm512_slli_epi32(shared, 2), high));
        } else {
            out[1] = _mm512_and_si512(_mm512_srli_epi32(own, 3), mask);
            out[3] = _mm512_and_si512(_mm512_srli_epi32(own, 6), _mm512_set1_epi8(0x03));
            out[3] = _mm512_or_si512(out[3], _mm512_and_si512(_mm512_srli_epi32(shared, 1), high));
        }
    } else {
        const __m512i word = _mm512_loadu_si512(codes + half * kLanes), mask = _mm512_set1_epi8(0x03);
        for (int p = 0; p < 4; ++p) out[p] = _mm512_and_si512(_mm512_srli_epi32(word, 2 * p), mask);
    }
}

// Into the second level, which can wait for more lines at a time than the first.
template <int BITS>
AUTOQ_AVX512_INLINE void prefetch_half(const uint32_t* codes, int64_t half) {
    constexpr int kHalfBytes = 2 * BITS * kLanes;
    if (weights_ahead_bytes == 0) return;
    const char* ahead = reinterpret_cast<const char*>(codes) + half * kHalfBytes + weights_ahead_bytes;
    for (int line = 0; line < (kHalfBytes + 63) / 64; ++line) _mm_prefetch(ahead + line * 64, _MM_HINT_T1);
}

// The end of a block (`combine_digits`): adds to the results of 16 outputs what the sums of the digits give. `index` is
// that of the row and block in the row's parameters.
template <int DIGITS>
AUTOQ_AVX512_INLINE __m512 add_digits(__m512 result, const __m512i* dots, const FixedPointRows& fixed, int64_t index,
                                      __m512 zero, __m512 scale) {
    __m512 value = _mm512_setzero_ps();
    for (int d = DIGITS - 1; d >= 0; --d) {
        const __m512 sum = _mm512_set1_ps(fixed.sums[index * DIGITS + d]);
        const __m512 centred = _mm512_fnmadd_ps(zero, sum, _mm512_cvtepi32_ps(dots[d]));
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), centred);
    }
    value = _mm512_mul_ps(value, _mm512_set1_ps(fixed.scales[index]));
    // Multiplied and added in two roundings, as on processors without fused multiply-add.
    return _mm512_add_ps(result, _mm512_mul_ps(scale, value));
}

}  // namespace autoq::cpu
