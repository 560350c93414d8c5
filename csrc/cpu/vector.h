// Sixteen fp32 lanes in the registers of an instruction set: one of AVX-512, two of AVX2, four of SSE or NEON. Included
// once for each, inside its namespace and its target region; no include guard.
//
// Operations go register by register. The compiler's vector types may be wider than a register, but GCC keeps such
// vectors in memory, and compares them lane by lane.

#if AUTOQ_LEVEL == 512
#define AUTOQ_REGISTER_BYTES 64
#elif AUTOQ_LEVEL == 256
#define AUTOQ_REGISTER_BYTES 32
#else
#define AUTOQ_REGISTER_BYTES 16
#endif

typedef float Register __attribute__((vector_size(AUTOQ_REGISTER_BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(AUTOQ_REGISTER_BYTES)));
typedef uint32_t WordRegister __attribute__((vector_size(AUTOQ_REGISTER_BYTES)));
typedef uint16_t ShortRegister __attribute__((vector_size(AUTOQ_REGISTER_BYTES / 2)));
typedef int8_t ByteRegister __attribute__((vector_size(AUTOQ_REGISTER_BYTES / 4)));

#undef AUTOQ_REGISTER_BYTES

constexpr int kRegisterLanes = sizeof(Register) / 4;
constexpr int kRegisters = kLanes / kRegisterLanes;

struct Lanes {
    Register of[kRegisters];
};

#define AUTOQ_VECTOR static inline __attribute__((always_inline))
#define AUTOQ_EACH_REGISTER _Pragma("GCC unroll 4") for (int i = 0; i < kRegisters; ++i)

AUTOQ_VECTOR Lanes all_lanes(float value) {
    Lanes lanes;
    AUTOQ_EACH_REGISTER lanes.of[i] = value - Register{};
    return lanes;
}

#define AUTOQ_OPERATOR(op)                                                         \
    AUTOQ_VECTOR Lanes operator op(Lanes a, Lanes b) {                             \
        AUTOQ_EACH_REGISTER a.of[i] = a.of[i] op b.of[i];                          \
        return a;                                                                  \
    }                                                                              \
    AUTOQ_VECTOR Lanes operator op(float a, Lanes b) { return all_lanes(a) op b; } \
    AUTOQ_VECTOR Lanes operator op(Lanes a, float b) { return a op all_lanes(b); } \
    AUTOQ_VECTOR Lanes& operator op## = (Lanes & a, Lanes b) { return a = a op b; }
AUTOQ_OPERATOR(+)
AUTOQ_OPERATOR(-)
AUTOQ_OPERATOR(*)
AUTOQ_OPERATOR(/)
#undef AUTOQ_OPERATOR

AUTOQ_VECTOR Lanes operator-(Lanes a) {
    AUTOQ_EACH_REGISTER a.of[i] = -a.of[i];
    return a;
}

// a * b + c
AUTOQ_VECTOR Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    AUTOQ_EACH_REGISTER {
#if AUTOQ_LEVEL == 512
        c.of[i] = _mm512_fmadd_ps(a.of[i], b.of[i], c.of[i]);
#elif AUTOQ_LEVEL == 256
        c.of[i] = _mm256_fmadd_ps(a.of[i], b.of[i], c.of[i]);
#elif AUTOQ_LEVEL == 128
        c.of[i] = vfmaq_f32(c.of[i], a.of[i], b.of[i]);
#else
        c.of[i] += a.of[i] * b.of[i];
#endif
    }
    return c;
}

AUTOQ_VECTOR float sum_of(Lanes lanes) {
    Register sum = lanes.of[0];
    for (int i = 1; i < kRegisters; ++i) sum += lanes.of[i];
#if AUTOQ_LEVEL == 512
    return _mm512_reduce_add_ps(sum);
#elif AUTOQ_LEVEL == 128
    return vaddvq_f32(sum);
#else
#if AUTOQ_LEVEL == 256
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
#else
    const Register four = sum;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

// Lane i of vector j becomes lane j of vector i.
AUTOQ_VECTOR void transpose(Lanes (&vectors)[16]) {
#if AUTOQ_LEVEL == 512
    __m512 pairs[16], fours[16];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = vectors[2 * i].of[0], b = vectors[2 * i + 1].of[0];
        pairs[2 * i] = _mm512_unpacklo_ps(a, b);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(a, b);
    }
    // Part l of `fours[4 * i + c]` has lane 4 * l + c of vectors 4 * i .. 4 * i + 3.
    for (int i = 0; i < 16; i += 4) {
        for (int c = 0; c < 2; ++c) {
            const __m512d a = _mm512_castps_pd(pairs[i + c]), b = _mm512_castps_pd(pairs[i + c + 2]);
            fours[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 even_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        vectors[c].of[0] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        vectors[4 + c].of[0] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        vectors[8 + c].of[0] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        vectors[12 + c].of[0] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
#else
    float values[16][16], turned[16][16];
    std::memcpy(values, vectors, sizeof values);
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) turned[i][j] = values[j][i];
    }
    std::memcpy(vectors, turned, sizeof turned);
#endif
}

// In each lane `a < b ? yes : no`.
AUTOQ_VECTOR Lanes where_less(Lanes a, Lanes b, Lanes yes, Lanes no) {
    AUTOQ_EACH_REGISTER yes.of[i] = a.of[i] < b.of[i] ? yes.of[i] : no.of[i];
    return yes;
}

// The lanes of `values`, but those of `x` where they are NaN.
AUTOQ_VECTOR Lanes keep_nan(Lanes x, Lanes values) {
    AUTOQ_EACH_REGISTER values.of[i] = x.of[i] == x.of[i] ? values.of[i] : x.of[i];
    return values;
}

// The larger and the smaller of two; `b` if one is NaN.
AUTOQ_VECTOR Lanes larger(Lanes a, Lanes b) {
#if AUTOQ_LEVEL == 512
    return {_mm512_max_ps(a.of[0], b.of[0])};
#else
    return where_less(b, a, a, b);
#endif
}

AUTOQ_VECTOR Lanes smaller(Lanes a, Lanes b) {
#if AUTOQ_LEVEL == 512
    return {_mm512_min_ps(a.of[0], b.of[0])};
#else
    return where_less(a, b, a, b);
#endif
}

AUTOQ_VECTOR float largest_of(Lanes lanes) {
#if AUTOQ_LEVEL == 512
    return _mm512_reduce_max_ps(lanes.of[0]);
#else
    Register most = lanes.of[0];
    for (int i = 1; i < kRegisters; ++i) most = most > lanes.of[i] ? most : lanes.of[i];
    float largest = most[0];
    for (int i = 1; i < kRegisterLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest;
#endif
}

// What the lanes of a vector are reduced to.
struct Sum {
    AUTOQ_VECTOR Lanes join(Lanes a, Lanes b) { return a + b; }
    AUTOQ_VECTOR float all(Lanes lanes) { return sum_of(lanes); }
};

struct Largest {
    AUTOQ_VECTOR Lanes join(Lanes a, Lanes b) { return larger(a, b); }
    AUTOQ_VECTOR float all(Lanes lanes) { return largest_of(lanes); }
};

// Each of sixteen vectors reduced, to a lane.
template <class REDUCTION>
AUTOQ_VECTOR Lanes reduce_each(const Lanes (&vectors)[16]) {
#if AUTOQ_LEVEL == 512
    // Pairs of vectors become one, four times.
    Lanes eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = vectors[2 * i].of[0], b = vectors[2 * i + 1].of[0];
        eight[i] = REDUCTION::join({_mm512_unpacklo_ps(a, b)}, {_mm512_unpackhi_ps(a, b)});
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(eight[2 * i].of[0]), b = _mm512_castps_pd(eight[2 * i + 1].of[0]);
        four[i] =
            REDUCTION::join({_mm512_castpd_ps(_mm512_unpacklo_pd(a, b))}, {_mm512_castpd_ps(_mm512_unpackhi_pd(a, b))});
    }
    const auto halves = [](Lanes a, Lanes b) __attribute__((always_inline)) {
        return REDUCTION::join({_mm512_shuffle_f32x4(a.of[0], b.of[0], 0x88)},
                               {_mm512_shuffle_f32x4(a.of[0], b.of[0], 0xdd)});
    };
    for (int i = 0; i < 2; ++i) two[i] = halves(four[2 * i], four[2 * i + 1]);
    return halves(two[0], two[1]);
#else
    float reduced[16];
    for (int i = 0; i < 16; ++i) reduced[i] = REDUCTION::all(vectors[i]);
    Lanes lanes;
    AUTOQ_EACH_REGISTER std::memcpy(&lanes.of[i], reduced + i * kRegisterLanes, sizeof(Register));
    return lanes;
#endif
}

// The lanes before `count`, and zeros.
AUTOQ_VECTOR Lanes first_lanes(Lanes lanes, int64_t count) {
    float values[16];
    std::memcpy(values, &lanes, 64);
    for (int64_t i = count; i < 16; ++i) values[i] = 0.0f;
    std::memcpy(&lanes, values, 64);
    return lanes;
}

// A register of values from fp16, and back.
AUTOQ_VECTOR Register load_fp16(const uint16_t* data) {
#if AUTOQ_LEVEL == 512
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
#elif AUTOQ_LEVEL == 256
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
#elif AUTOQ_LEVEL == 128
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(data)));
#else
    return Register{half_to_float(data[0]), half_to_float(data[1]), half_to_float(data[2]), half_to_float(data[3])};
#endif
}

AUTOQ_VECTOR void store_fp16(uint16_t* data, Register values) {
#if AUTOQ_LEVEL == 512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
#elif AUTOQ_LEVEL == 256
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
#elif AUTOQ_LEVEL == 128
    vst1_u16(data, vreinterpret_u16_f16(vcvt_f16_f32(values)));
#else
    for (int i = 0; i < kRegisterLanes; ++i) data[i] = c10::Half(values[i]).x;
#endif
}

// A register of values from bf16, and back, rounded to the nearest, ties to even.
AUTOQ_VECTOR Register load_bf16(const uint16_t* data) {
#if AUTOQ_LEVEL == 512
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
#elif AUTOQ_LEVEL == 256
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
#else
    ShortRegister bits;
    std::memcpy(&bits, data, sizeof bits);
    return reinterpret_cast<Register>(__builtin_convertvector(bits, WordRegister) << 16);
#endif
}

AUTOQ_VECTOR void store_bf16(uint16_t* data, Register values) {
    const WordRegister bits = reinterpret_cast<WordRegister>(values);
    const WordRegister rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const WordRegister result = (bits & 0x7fffffff) > 0x7f800000 ? WordRegister{} + 0x7fc0 : rounded;
    const ShortRegister shorts = __builtin_convertvector(result, ShortRegister);
    std::memcpy(data, &shorts, sizeof shorts);
}

template <Float DTYPE>
AUTOQ_VECTOR Lanes load(const void* data, int64_t index) {
    Lanes lanes;
    if constexpr (DTYPE == Float::kFloat32) {
        const float* values = static_cast<const float*>(data) + index;
        AUTOQ_EACH_REGISTER std::memcpy(&lanes.of[i], values + i * kRegisterLanes, sizeof(Register));
    } else {
        const uint16_t* values = static_cast<const uint16_t*>(data) + index;
        AUTOQ_EACH_REGISTER {
            const uint16_t* some = values + i * kRegisterLanes;
            lanes.of[i] = DTYPE == Float::kBFloat16 ? load_bf16(some) : load_fp16(some);
        }
    }
    return lanes;
}

template <Float DTYPE>
AUTOQ_VECTOR void store(void* data, int64_t index, const Lanes& lanes) {
    if constexpr (DTYPE == Float::kFloat32) {
        float* values = static_cast<float*>(data) + index;
        AUTOQ_EACH_REGISTER std::memcpy(values + i * kRegisterLanes, &lanes.of[i], sizeof(Register));
    } else {
        uint16_t* values = static_cast<uint16_t*>(data) + index;
        AUTOQ_EACH_REGISTER {
            uint16_t* some = values + i * kRegisterLanes;
            DTYPE == Float::kBFloat16 ? store_bf16(some, lanes.of[i]) : store_fp16(some, lanes.of[i]);
        }
    }
}

AUTOQ_VECTOR Lanes load_bytes(const int8_t* data) {
    Lanes lanes;
    AUTOQ_EACH_REGISTER {
        ByteRegister bytes;
        std::memcpy(&bytes, data + i * kRegisterLanes, sizeof bytes);
        lanes.of[i] = __builtin_convertvector(__builtin_convertvector(bytes, IntRegister), Register);
    }
    return lanes;
}

// At most sixteen values; the lanes behind `count` are zero.
template <Float DTYPE>
AUTOQ_VECTOR Lanes load_some(const void* data, int64_t index, int64_t count) {
    if (count >= 16) return load<DTYPE>(data, index);
    float values[16] = {0};
    for (int64_t i = 0; i < count; ++i) values[i] = load_float(data, DTYPE, index + i);
    return load<Float::kFloat32>(values, 0);
}

template <Float DTYPE>
AUTOQ_VECTOR void store_some(void* data, int64_t index, int64_t count, const Lanes& lanes) {
    if (count >= 16) return store<DTYPE>(data, index, lanes);
    float values[16];
    store<Float::kFloat32>(values, 0, lanes);
    for (int64_t i = 0; i < count; ++i) store_float(data, DTYPE, index + i, values[i]);
}

// e^x to about one unit in the last place: 2^n e^r with |r| <= ln(2) / 2, and a polynomial for e^r. Below -87.3 zero.
AUTOQ_VECTOR Lanes exponential(Lanes x) {
    const Lanes lowest = all_lanes(-87.3f), highest = all_lanes(88.7f), magic = all_lanes(12582912.0f);  // 1.5 * 2^23
    const Lanes bounded = smaller(highest, larger(lowest, x));                                           // NaN stays
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
#if AUTOQ_LEVEL == 512
    const __mmask16 kept = _mm512_cmp_ps_mask(x.of[0], lowest.of[0], _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(kept, power.of[0], whole.of[0])};
#else
    AUTOQ_EACH_REGISTER {
        // The whole part is in the low bits of the shifted number.
        const IntRegister exponent = reinterpret_cast<IntRegister>(shifted.of[i]) << 23;
        power.of[i] = reinterpret_cast<Register>(reinterpret_cast<IntRegister>(power.of[i]) + exponent);
    }
    return keep_nan(x, where_less(x, lowest, Lanes{}, power));
#endif
}

// Values are read and written in steps of a register; the last step of a row may be a part of one.
template <class Step>
AUTOQ_VECTOR void for_each_step(int64_t columns, Step&& step) {
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) step(column, 16);
    if (column < columns) step(column, columns - column);
}
