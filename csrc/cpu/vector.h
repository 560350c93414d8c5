// Sixteen fp32 lanes, in the compiler's vector types: the same source becomes one AVX-512 register, two of AVX2 or four
// of SSE or NEON. Included once for each instruction set, inside its namespace and its target region; no include guard.

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

#define AUTOQ_VECTOR static inline __attribute__((always_inline))

// The lanes as registers.
#if AUTOQ_LEVEL == 512
typedef Lanes Register;
#elif AUTOQ_LEVEL == 256
typedef __m256 Register;
#elif AUTOQ_LEVEL == 128
typedef float32x4_t Register;
#else
typedef float Register __attribute__((vector_size(16)));
#endif

constexpr int kRegisters = sizeof(Lanes) / sizeof(Register);

union Cut {
    Lanes all;
    Register of[kRegisters];
};

AUTOQ_VECTOR Lanes all_lanes(float value) {
    return Lanes{value, value, value, value, value, value, value, value,
                 value, value, value, value, value, value, value, value};
}

AUTOQ_VECTOR Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if AUTOQ_LEVEL == 512
    return _mm512_fmadd_ps(a, b, c);
#elif AUTOQ_LEVEL == 0
    return a * b + c;
#else
    Cut x{a}, y{b}, z{c};
    for (int i = 0; i < kRegisters; ++i) {
#if AUTOQ_LEVEL == 256
        z.of[i] = _mm256_fmadd_ps(x.of[i], y.of[i], z.of[i]);
#else
        z.of[i] = vfmaq_f32(z.of[i], x.of[i], y.of[i]);
#endif
    }
    return z.all;
#endif
}

AUTOQ_VECTOR float sum_of(Lanes lanes) {
#if AUTOQ_LEVEL == 512
    return _mm512_reduce_add_ps(lanes);
#elif AUTOQ_LEVEL == 256
    const Cut x{lanes};
    const __m256 eight = _mm256_add_ps(x.of[0], x.of[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#elif AUTOQ_LEVEL == 128
    const Cut x{lanes};
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.of[0], x.of[1]), vaddq_f32(x.of[2], x.of[3])));
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

// In each lane `a < b ? yes : no`. GCC compares vectors wider than a register one lane at a time, so they are cut.
AUTOQ_VECTOR Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
    const Cut x{a}, y{b}, otherwise{no};
    Cut result{yes};
    for (int i = 0; i < kRegisters; ++i) result.of[i] = x.of[i] < y.of[i] ? result.of[i] : otherwise.of[i];
    return result.all;
}

// The lanes of `values`, but those of `x` where they are NaN.
AUTOQ_VECTOR Lanes keep_nan(Lanes x, Lanes values) {
    const Cut source{x};
    Cut result{values};
    for (int i = 0; i < kRegisters; ++i) {
        result.of[i] = source.of[i] == source.of[i] ? result.of[i] : source.of[i];
    }
    return result.all;
}

AUTOQ_VECTOR Lanes larger(Lanes a, Lanes b) { return where_less(b, a, a, b); }

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

// A register of values from fp16, and back.
#if AUTOQ_LEVEL == 256
AUTOQ_VECTOR Register load_fp16(const uint16_t* data) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
AUTOQ_VECTOR void store_fp16(uint16_t* data, Register values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
#elif AUTOQ_LEVEL == 128
AUTOQ_VECTOR Register load_fp16(const uint16_t* data) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(data))); }
AUTOQ_VECTOR void store_fp16(uint16_t* data, Register values) {
    vst1_u16(data, vreinterpret_u16_f16(vcvt_f16_f32(values)));
}
#elif AUTOQ_LEVEL == 0
AUTOQ_VECTOR Register load_fp16(const uint16_t* data) {
    return Register{half_to_float(data[0]), half_to_float(data[1]), half_to_float(data[2]), half_to_float(data[3])};
}
AUTOQ_VECTOR void store_fp16(uint16_t* data, Register values) {
    for (int i = 0; i < 4; ++i) data[i] = c10::Half(values[i]).x;
}
#endif

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
        Cut values;
        const auto* bits = static_cast<const uint16_t*>(data) + index;
        for (int i = 0; i < kRegisters; ++i) values.of[i] = load_fp16(bits + i * (16 / kRegisters));
        lanes = values.all;
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
        // All bits where the value is NaN. A comparison would be made lane by lane, see `where_less`.
        const Words nan = reinterpret_cast<Words>(reinterpret_cast<Ints>(0x7f800000 - (bits & 0x7fffffff)) >> 31);
        const Shorts shorts = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Shorts);
        std::memcpy(static_cast<uint16_t*>(data) + index, &shorts, 32);
    } else {
#if AUTOQ_LEVEL == 512
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + index),
                            _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
#else
        const Cut values{lanes};
        auto* bits = static_cast<uint16_t*>(data) + index;
        for (int i = 0; i < kRegisters; ++i) store_fp16(bits + i * (16 / kRegisters), values.of[i]);
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
    const Lanes bounded = where_less(x, lowest, lowest, where_less(highest, x, highest, x));
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
    return keep_nan(x, where_less(x, lowest, Lanes{}, result));
}
