// Codes to numbers. Exactly: or-ed into the mantissa of a power of two, from which the zero point is then taken away.
#pragma once

#include "device.h"

namespace autoq::cuda {

// Powers of two whose last mantissa bit is worth 1, as pairs; and their negatives, into which zero points are or-ed.
template <typename T>
constexpr uint32_t kMagic = std::is_same_v<T, Half> ? 0x64006400u : 0x43004300u;  // 1024, 128
template <typename T>
constexpr uint32_t kNegativeMagic = kMagic<T> | 0x80008000u;
template <typename T>
constexpr uint32_t kOne = std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;

// bf16 has no room for 8 bits beside its leading one.
template <typename T, int kBits>
constexpr bool kThroughFloat = std::is_same_v<T, BFloat16> && kBits == 8;

// The zero point of a row, in the form that `decode_row` subtracts. Zero points of up to 63 are exact.
template <typename T, int kBits>
struct Zero {
    uint32_t pair;       // -(magic + zero)
    uint32_t high_pair;  // fp16, 4 bits: -(64 + zero), for codes that stand four bits higher
    float value;         // magic + zero, where bf16 is made through fp32

    __device__ __forceinline__ void set(uint32_t zeros, int row) {
        const uint32_t twice = permute_bytes(zeros, 0, 0x4040 + 0x0101 * row);  // the byte in both halves
        if constexpr (kThroughFloat<T, kBits>) {
            value = 8388608.0f + static_cast<float>(twice & 0xff);
        } else {
            pair = twice | kNegativeMagic<T>;
            if constexpr (std::is_same_v<T, Half> && kBits == 4) high_pair = twice << 4 | 0xd400d400u;
        }
    }
};

// 2^23 + byte `i` of a word, less the zero.
__device__ __forceinline__ float byte_to_float(uint32_t word, int i, float zero) {
    union {
        uint32_t bits;
        float value;
    } number{permute_bytes(word, 0x4b000000u, 0x7440 + i)};
    return number.value - zero;
}

// Eight columns of a row, code minus zero, as the pairs (0, 4) (1, 5) (2, 6) (3, 7). `low` and `high` are the lane's
// words of the row, of which 2 and 4 bits need only the first; t is the lane's place among the columns.
template <typename T, int kBits>
__device__ __forceinline__ void decode_row(uint32_t low, uint32_t high, int t, const Zero<T, kBits>& zero,
                                           uint32_t (&pairs)[4]) {
    if constexpr (kThroughFloat<T, kBits>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = pair_from_floats<T>(byte_to_float(low, i, zero.value), byte_to_float(high, i, zero.value));
        }
    } else if constexpr (kBits == 8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bytes = permute_bytes(low, high, 0x0400 + 0x0101 * i);
            pairs[i] = fma_pairs<T>(and_or(bytes, 0x00ff00ffu, kMagic<T>), kOne<T>, zero.pair);
        }
    } else if constexpr (kBits == 4 && std::is_same_v<T, Half>) {
        // A code four bits higher counts 16 times; a sixteenth of 1024 is 64. One shift instead of three.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = i < 2 ? low : low >> 8;
            const uint32_t magic = and_or(word, i % 2 ? 0x00f000f0u : 0x000f000fu, kMagic<T>);
            constexpr uint32_t kSixteenth = 0x2c002c00u;
            pairs[i] = fma_pairs<T>(magic, i % 2 ? kSixteenth : kOne<T>, i % 2 ? zero.high_pair : zero.pair);
        }
    } else if constexpr (kBits == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = fma_pairs<T>(and_or(low >> (4 * i), 0x000f000fu, kMagic<T>), kOne<T>, zero.pair);
        }
    } else {
        // Two bytes of a word, spread so that columns i and i + 4 stand 16 bits apart.
        const auto spread = [&](uint32_t word) { return permute_bytes(word, 0u, t % 2 == 0 ? 0x4140 : 0x4342); };
        const uint32_t own = spread(low);
        uint32_t codes[4];
        if constexpr (kBits == 3) {
            const uint32_t shared = spread(high) >> (t / 2 * 4);
            codes[0] = and_or(own, 0x00070007u, kMagic<T>);
            codes[1] = and_or(own >> 3, 0x00070007u, kMagic<T>);
            codes[2] = and_or(shared, 0x00070007u, kMagic<T>);
            codes[3] = and_or(shared >> 1, 0x00040004u, and_or(own >> 6, 0x00030003u, kMagic<T>));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) codes[i] = and_or(own >> (2 * i), 0x00030003u, kMagic<T>);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = fma_pairs<T>(codes[i], kOne<T>, zero.pair);
    }
}

// Eight columns of the input in the order of decode_row's: as the pairs (0, 4) (1, 5) (2, 6) (3, 7).
__device__ __forceinline__ void pair_columns(const uint4& x, uint32_t (&pairs)[4]) {
    pairs[0] = permute_bytes(x.x, x.z, 0x5410);
    pairs[1] = permute_bytes(x.x, x.z, 0x7632);
    pairs[2] = permute_bytes(x.y, x.w, 0x5410);
    pairs[3] = permute_bytes(x.y, x.w, 0x7632);
}

}  // namespace autoq::cuda
