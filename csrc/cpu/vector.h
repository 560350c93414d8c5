// Sixteen fp32 lanes, in the compiler's vector types: the same source becomes one AVX-512 register, two of AVX2 or four
// of SSE or NEON. Included once for each instruction set, inside its namespace and its target region; no include guard.

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

#define AUTOQ_VECTOR static inline __attribute__((always_inline))

AUTOQ_VECTOR Lanes all_lanes(float value) {
    return Lanes{value, value, value, value, value, value, value, value,
                 value, value, value, value, value, value, value, value};
}

AUTOQ_VECTOR Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if AUTOQ_LEVEL == 512
    return _mm512_fmadd_ps(a, b, c);
#elif AUTOQ_LEVEL == 256
    union {
        Lanes all;
        __m256 half[2];
    } x{a}, y{b}, z{c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.all;
#else
    return a * b + c;
#endif
}

AUTOQ_VECTOR float sum_of(Lanes lanes) {
#if AUTOQ_LEVEL == 512
    return _mm512_reduce_add_ps(lanes);
#elif AUTOQ_LEVEL == 256
    union {
        Lanes all;
        __m256 half[2];
    } x{lanes};
    const __m256 eight = _mm256_add_ps(x.half[0], x.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float value[16];
    std::memcpy(value, &lanes, 64);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) value[i] += value[i + width];
    return value[0];
#endif
}

// The sums of sixteen vectors, one in each lane.
AUTOQ_VECTOR Lanes sums_of(const Lanes (&vectors)[16]) {
#if AUTOQ_LEVEL == 512
    // Pairs of vectors become one, four times: each lane then holds the sum over one vector.
    __m512 eight[8], four[4];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = vectors[2 * i], b = vectors[2 * i + 1];
        eight[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 first =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    const __m512 second =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
#else
    float sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = sum_of(vectors[i]);
    Lanes lanes;
    std::memcpy(&lanes, sums, 64);
    return lanes;
#endif
}

AUTOQ_VECTOR Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

AUTOQ_VECTOR float largest_of(Lanes lanes) {
#if AUTOQ_LEVEL == 512
    return _mm512_reduce_max_ps(lanes);
#else
    float value[16];
    std::memcpy(value, &lanes, 64);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) value[i] = value[i] > value[i + width] ? value[i] : value[i + width];
    return value[0];
#endif
}

template <Float DTYPE>
AUTOQ_VECTOR Lanes load(const void* data, int64_t index) {
    Lanes lanes;
    if constexpr (DTYPE == Float::kFloat32) {
        std::memcpy(&lanes, static_cast<const float*>(data) + index, 64);
    } else if constexpr (DTYPE == Float::kBFloat16) {
#if AUTOQ_LEVEL == 512
        const auto* bits = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index);
        lanes = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(bits)), 16));
#else
        typedef uint16_t Shorts __attribute__((vector_size(32)));
        typedef uint32_t Words __attribute__((vector_size(64)));
        Shorts bits;
        std::memcpy(&bits, static_cast<const uint16_t*>(data) + index, 32);
        const Words words = __builtin_convertvector(bits, Words) << 16;
        std::memcpy(&lanes, &words, 64);
#endif
    } else {
#if AUTOQ_LEVEL == 512
        lanes = _mm512_cvtph_ps(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index)));
#else
        float values[16];
        for (int i = 0; i < 16; ++i) values[i] = load_float(data, DTYPE, index + i);
        std::memcpy(&lanes, values, 64);
#endif
    }
    return lanes;
}

template <Float DTYPE>
AUTOQ_VECTOR void store(void* data, int64_t index, Lanes lanes) {
    if constexpr (DTYPE == Float::kFloat32) {
        std::memcpy(static_cast<float*>(data) + index, &lanes, 64);
    } else if constexpr (DTYPE == Float::kBFloat16) {
        typedef uint16_t Shorts __attribute__((vector_size(32)));
        typedef uint32_t Words __attribute__((vector_size(64)));
        Words bits;
        std::memcpy(&bits, &lanes, 64);
        const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const Words nan = (bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc0 : rounded;
        const Shorts shorts = __builtin_convertvector(nan, Shorts);
        std::memcpy(static_cast<uint16_t*>(data) + index, &shorts, 32);
    } else {
#if AUTOQ_LEVEL == 512
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + index),
                            _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#else
        float values[16];
        std::memcpy(values, &lanes, 64);
        for (int i = 0; i < 16; ++i) store_float(data, DTYPE, index + i, values[i]);
#endif
    }
}

AUTOQ_VECTOR Lanes load_bytes(const int8_t* data) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    std::memcpy(&bytes, data, 16);
    return __builtin_convertvector(bytes, Lanes);
}

// At most sixteen values; the lanes behind `count` are zero.
template <Float DTYPE>
AUTOQ_VECTOR Lanes load_some(const void* data, int64_t index, int64_t count) {
    if (count >= 16) return load<DTYPE>(data, index);
    float values[16] = {0};
    for (int64_t i = 0; i < count; ++i) values[i] = load_float(data, DTYPE, index + i);
    Lanes lanes;
    std::memcpy(&lanes, values, 64);
    return lanes;
}

template <Float DTYPE>
AUTOQ_VECTOR void store_some(void* data, int64_t index, int64_t count, Lanes lanes) {
    if (count >= 16) return store<DTYPE>(data, index, lanes);
    float values[16];
    std::memcpy(values, &lanes, 64);
    for (int64_t i = 0; i < count; ++i) store_float(data, DTYPE, index + i, values[i]);
}

// e^x to about one unit in the last place: 2^n e^r with |r| <= ln(2) / 2, and a polynomial for e^r. Below -87.3 zero.
AUTOQ_VECTOR Lanes exponential(Lanes x) {
    const Lanes lowest = all_lanes(-87.3f), highest = all_lanes(88.7f), magic = all_lanes(12582912.0f);  // 1.5 * 2^23
    const Lanes bounded = x < lowest ? lowest : (x > highest ? highest : x);
    const Lanes shifted = multiply_add(bounded, all_lanes(1.44269504f), magic);
    const Lanes whole = shifted - magic;
    Lanes rest = multiply_add(whole, all_lanes(-0.693359375f), bounded);
    rest = multiply_add(whole, all_lanes(2.12194440e-4f), rest);
    Lanes power = all_lanes(1.0f / 5040);
    power = multiply_add(power, rest, all_lanes(1.0f / 720));
    power = multiply_add(power, rest, all_lanes(1.0f / 120));
    power = multiply_add(power, rest, all_lanes(1.0f / 24));
    power = multiply_add(power, rest, all_lanes(1.0f / 6));
    power = multiply_add(power, rest, all_lanes(0.5f));
    power = multiply_add(power, rest, all_lanes(1.0f));
    power = multiply_add(power, rest, all_lanes(1.0f));
    Ints exponent, bits;
    std::memcpy(&exponent, &shifted, 64);
    std::memcpy(&bits, &power, 64);
    bits += exponent << 23;  // the whole part is in the low bits of the shifted number
    Lanes result;
    std::memcpy(&result, &bits, 64);
    result = x < lowest ? Lanes{} : result;
    return x != x ? x : result;
}
