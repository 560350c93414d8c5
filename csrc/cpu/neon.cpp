// The kernels for ARM processors with dot products of bytes (asimddp: most since 2018). One register holds the same
// columns of 4 output rows, a quarter of a block.
//
// The dot products are of signed bytes: 8-bit codes become `code - 128`, and where bytes of activations would have no
// sign, they are 128 less too. What that changes is put right at the end of a block, in integers.
#include "kernels.h"

#if defined(AUTOQ_NEON)

#include <arm_neon.h>

#include "dispatch.h"

#if defined(__ARM_FEATURE_DOTPROD)
#define AUTOQ_TARGET
#else
#define AUTOQ_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define AUTOQ_INLINE AUTOQ_TARGET __attribute__((always_inline)) inline

namespace autoq::cpu {
namespace {

constexpr int kWidth = 4;
constexpr int kQuads = kLanes / kWidth;  // registers for 16 outputs

AUTOQ_INLINE float32x4_t load_four(const void* data, Float dtype, int64_t index) {
    if (dtype == Float::kFloat32) return vld1q_f32(static_cast<const float*>(data) + index);
    const uint16x4_t bits = vld1_u16(static_cast<const uint16_t*>(data) + index);
    if (dtype == Float::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

// Four values as fp32; at most `count` are read, the others are zero.
AUTOQ_INLINE float32x4_t load_values(const void* data, Float dtype, int64_t index, int64_t count) {
    if (count >= kWidth) return load_four(data, dtype, index);
    float values[kWidth] = {0};
    for (int64_t i = 0; i < count; ++i) values[i] = load_float(data, dtype, index + i);
    return vld1q_f32(values);
}

// The bf16 nearest to each value, ties to even.
AUTOQ_INLINE uint16x4_t round_to_bf16(float32x4_t values) {
    const uint32x4_t bits = vreinterpretq_u32_f32(values);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(values, values)), rounded, vdup_n_u16(0x7fc0));
}

AUTOQ_INLINE void store_values(void* data, Float dtype, int64_t index, int64_t count, float32x4_t values) {
    if (count < kWidth) {
        float lanes[kWidth];
        vst1q_f32(lanes, values);
        for (int64_t i = 0; i < count; ++i) store_float(data, dtype, index + i, lanes[i]);
    } else if (dtype == Float::kFloat32) {
        vst1q_f32(static_cast<float*>(data) + index, values);
    } else {
        const bool half = dtype == Float::kFloat16;
        vst1_u16(static_cast<uint16_t*>(data) + index,
                 half ? vreinterpret_u16_f16(vcvt_f16_f32(values)) : round_to_bf16(values));
    }
}

// Four outputs of a row, from `first` on, with the bias, leaving out the padding.
AUTOQ_INLINE void store_results(float32x4_t result, const PackedWeight& weight, const OutputRows& output, int64_t row,
                                int64_t first) {
    const int64_t count = weight.out_features - first;
    if (output.bias) result = vaddq_f32(result, load_values(output.bias, output.dtype, first, count));
    store_values(output.data, output.dtype, row * output.stride + first, count, result);
}

AUTOQ_INLINE int32x4_t load_zeros(const uint8_t* zeros) {
    uint32_t four;
    std::memcpy(&four, zeros, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

// ---- activations -------------------------------------------------------------------------------------------------

// Halves [begin, end) of one input row as fp32. Returns the magnitudes' largest bits.
AUTOQ_INLINE uint32_t load_block(const PackedWeight& weight, const InputRows& input, int64_t row, int64_t begin,
                                 int64_t end, float32x4_t (&values)[kBlockHalves][kQuads]) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int64_t half = begin; half < end; ++half) {
        for (int q = 0; q < kQuads; ++q) {
            const int64_t column = half * kHalfColumns + q * kWidth;
            const float32x4_t value =
                load_values(input.data, input.dtype, row * weight.in_features + column, weight.in_features - column);
            largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(value)));
            values[half - begin][q] = value;
        }
    }
    return vmaxvq_u32(largest);
}

AUTOQ_INLINE void to_integers(const float32x4_t (&values)[kQuads], float factor, int32x4_t (&integers)[kQuads]) {
    for (int q = 0; q < kQuads; ++q) integers[q] = vcvtnq_s32_f32(vmulq_n_f32(values[q], factor));
}

// The low byte of each of sixteen lanes, in the order that `order` says.
AUTOQ_INLINE int8x16_t low_bytes(const int32x4_t (&lanes)[kQuads], uint8x16_t order) {
    const int16x8_t first = vcombine_s16(vmovn_s32(lanes[0]), vmovn_s32(lanes[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(lanes[2]), vmovn_s32(lanes[3]));
    return vqtbl1q_s8(vcombine_s8(vmovn_s16(first), vmovn_s16(second)), order);
}

// (rest - low) / 2^BITS, `low` being the low bits with their sign.
template <int BITS>
AUTOQ_INLINE void drop_low(int32x4_t (&rest)[kQuads]) {
    for (int32x4_t& four : rest) four = vrshrq_n_s32(four, BITS);
}

template <int DIGITS>
AUTOQ_TARGET void prepare_block(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed,
                                int64_t row, int64_t block, int64_t begin, int64_t end, const int8_t* columns) {
    float32x4_t values[kBlockHalves][kQuads];
    const uint32_t largest = load_block(weight, input, row, begin, end, values);
    const BlockScale scale = block_scale(largest, digit_fraction_bits(DIGITS));
    const uint8x16_t order = vreinterpretq_u8_s8(vld1q_s8(columns));
    int32x4_t sums[DIGITS];
    for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
    for (int64_t half = begin; half < end; ++half) {
        int32x4_t rest[kQuads];
        to_integers(values[half - begin], scale.to_integer, rest);
        int8_t* out = fixed.half(row, half);
        for (int d = 0; d < DIGITS; ++d) {
            const int8x16_t digit = low_bytes(rest, order);
            vst1q_s8(out + d * kHalfColumns, digit);
            sums[d] = vdotq_s32(sums[d], digit, vdupq_n_s8(1));
            drop_low<8>(rest);
        }
    }
    fixed.scales[row * fixed.blocks + block] = scale.to_float;
    for (int d = 0; d < DIGITS; ++d) {
        fixed.sums[(row * fixed.blocks + block) * DIGITS + d] = static_cast<float>(vaddvq_s32(sums[d]));
    }
}

void prepare(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
             int64_t end) {
    with_digits(fixed.digits,
                [&](auto digits) { prepare_digits(prepare_block<digits>, weight, input, fixed, begin, end); });
}

// ---- multiplication ----------------------------------------------------------------------------------------------

// What unpacking subtracts from every code.
template <int BITS>
constexpr int kCodeOffset = BITS == 8 ? 128 : 0;

AUTOQ_INLINE uint8x16_t load_words(const uint32_t* words) { return vreinterpretq_u8_u32(vld1q_u32(words)); }

// The codes of one half of a unit (16 columns of 4 rows) as signed bytes, kCodeOffset less: register p has in each lane
// the four columns `column_of(BITS, 4 * p + byte)`.
template <int BITS>
AUTOQ_INLINE void unpack_half(const uint32_t* codes, int64_t half, int8x16_t (&out)[4]) {
    uint8x16_t bytes[4];
    if constexpr (BITS == 8) {
        for (int p = 0; p < 4; ++p) bytes[p] = veorq_u8(load_words(codes + (half * 4 + p) * kLanes), vdupq_n_u8(128));
    } else if constexpr (BITS == 4) {
        for (int w = 0; w < 2; ++w) {
            const uint8x16_t word = load_words(codes + (half * 2 + w) * kLanes);
            bytes[2 * w] = vandq_u8(word, vdupq_n_u8(15));
            bytes[2 * w + 1] = vshrq_n_u8(word, 4);
        }
    } else if constexpr (BITS == 3) {
        const uint32_t* unit = codes + (half / 2) * BITS * kLanes;
        const uint8x16_t own = load_words(unit + (half % 2) * kLanes), both = load_words(unit + 2 * kLanes);
        const uint8x16_t shared = half % 2 == 0 ? both : vshrq_n_u8(both, 4), mask = vdupq_n_u8(7);
        bytes[0] = vandq_u8(own, mask);
        bytes[1] = vandq_u8(vshrq_n_u8(own, 3), mask);
        bytes[2] = vandq_u8(shared, mask);
        bytes[3] = vorrq_u8(vshrq_n_u8(own, 6), vandq_u8(vshrq_n_u8(shared, 1), vdupq_n_u8(4)));
    } else {
        const uint8x16_t word = load_words(codes + half * kLanes), mask = vdupq_n_u8(3);
        bytes[0] = vandq_u8(word, mask);
        bytes[1] = vandq_u8(vshrq_n_u8(word, 2), mask);
        bytes[2] = vandq_u8(vshrq_n_u8(word, 4), mask);
        bytes[3] = vshrq_n_u8(word, 6);
    }
    for (int p = 0; p < 4; ++p) out[p] = vreinterpretq_s8_u8(bytes[p]);
}

// Adds the dot products of sixteen weights of each of 4 outputs with the sixteen bytes of a row.
AUTOQ_INLINE int32x4_t add_dots(int32x4_t dots, const int8x16_t (&weights)[4], int8x16_t row) {
    dots = vdotq_laneq_s32(dots, weights[0], row, 0);
    dots = vdotq_laneq_s32(dots, weights[1], row, 1);
    dots = vdotq_laneq_s32(dots, weights[2], row, 2);
    return vdotq_laneq_s32(dots, weights[3], row, 3);
}

// Adds one block, the halves [begin, end) of `ROWS` input rows, to the results of 4 * `QUADS` outputs.
template <int BITS, int DIGITS, int ROWS, int QUADS>
AUTOQ_INLINE void multiply_block(const uint32_t* codes, const FixedPointRows& fixed, int64_t row, int64_t block,
                                 int64_t begin, int64_t end, const float32x4_t (&zeros)[QUADS],
                                 const float32x4_t (&scales)[QUADS], float32x4_t (&result)[ROWS][QUADS]) {
    int32x4_t dots[ROWS][QUADS][DIGITS];
    for (auto& of_row : dots)
        for (auto& of_quad : of_row)
            for (int32x4_t& dot : of_quad) dot = vdupq_n_s32(0);
    for (int64_t half = begin; half < end; ++half) {
        for (int q = 0; q < QUADS; ++q) {
            int8x16_t unpacked[4];
            unpack_half<BITS>(codes + q * kWidth, half, unpacked);
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* digits = fixed.half(row + r, half);
                for (int d = 0; d < DIGITS; ++d) {
                    dots[r][q][d] = add_dots(dots[r][q][d], unpacked, vld1q_s8(digits + d * kHalfColumns));
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const int64_t index = (row + r) * fixed.blocks + block;
        for (int q = 0; q < QUADS; ++q) {
            float32x4_t value = vdupq_n_f32(0.0f);
            for (int d = DIGITS - 1; d >= 0; --d) {  // combine_digits
                const float sum = fixed.sums[index * DIGITS + d];
                const float32x4_t centred = vfmsq_n_f32(vcvtq_f32_s32(dots[r][q][d]), zeros[q], sum);
                value = vfmaq_n_f32(centred, value, 256.0f);
            }
            value = vmulq_n_f32(value, fixed.scales[index]);
            // Multiplied and added in two roundings, as on processors without fused multiply-add.
            result[r][q] = vaddq_f32(result[r][q], vmulq_f32(scales[q], value));
        }
    }
}

// `ROWS` input rows with 16 / `ROWS` outputs of a row block, those from `lanes` on: as many sums as registers hold.
template <int BITS, int DIGITS, int ROWS>
AUTOQ_TARGET void multiply_tile(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                int64_t row, int64_t row_block, int lanes) {
    constexpr int QUADS = kQuads / ROWS;
    const uint32_t* codes = weight.unit(row_block, 0) + lanes;
    const int64_t halves = weight.group_halves();
    float32x4_t result[ROWS][QUADS];
    for (auto& of_row : result)
        for (float32x4_t& four : of_row) four = vdupq_n_f32(0.0f);
    int64_t block = 0;
    for (int64_t group = 0; group < weight.groups; ++group) {
        float32x4_t zeros[QUADS], scales[QUADS];
        for (int q = 0; q < QUADS; ++q) {
            const int64_t parameters = (row_block * weight.groups + group) * kLanes + lanes + q * kWidth;
            const int32x4_t zero = load_zeros(weight.zeros + parameters);
            zeros[q] = vcvtq_f32_s32(vsubq_s32(zero, vdupq_n_s32(kCodeOffset<BITS>)));
            scales[q] = load_four(weight.scales, Float::kFloat16, parameters);
        }
        for (int64_t half = 0; half < halves; half += kBlockHalves, ++block) {
            const int64_t stop = half + kBlockHalves < halves ? half + kBlockHalves : halves;
            multiply_block<BITS, DIGITS, ROWS, QUADS>(codes, fixed, row, block, group * halves + half,
                                                      group * halves + stop, zeros, scales, result);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int q = 0; q < QUADS; ++q) {
            store_results(result[r][q], weight, output, row + r, row_block * kLanes + lanes + q * kWidth);
        }
    }
}

template <int BITS, int DIGITS, int ROWS>
void multiply_rows_few(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t& row,
                       int64_t row_block) {
    for (; row + ROWS <= fixed.rows; row += ROWS) {
        for (int lanes = 0; lanes < kLanes; lanes += kLanes / ROWS) {
            multiply_tile<BITS, DIGITS, ROWS>(weight, fixed, output, row, row_block, lanes);
        }
    }
}

template <int BITS, int DIGITS>
void multiply_blocks(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                     int64_t end) {
    for (int64_t row_block = begin; row_block < end; ++row_block) {
        int64_t row = 0;
        multiply_rows_few<BITS, DIGITS, 4>(weight, fixed, output, row, row_block);
        multiply_rows_few<BITS, DIGITS, 2>(weight, fixed, output, row, row_block);
        multiply_rows_few<BITS, DIGITS, 1>(weight, fixed, output, row, row_block);
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

Element element(Mode, Float, int) { return Element::kByte; }

// What makes the values of a block integers, and their low bytes signed ones: `integer + offset`.
struct TileScale {
    float to_integer, to_float;
    int32_t offset;
};

AUTOQ_INLINE TileScale tile_scale(const ActivationTiles& tiles, const float32x4_t (*values)[kQuads], int64_t halves,
                                  uint32_t largest_magnitude) {
    const BlockScale scale = block_scale(largest_magnitude, tiles.rounding.fraction_bits);
    if (tiles.rounding.mode == Mode::kExact || scale.to_integer == 0.0f) {
        return {scale.to_integer, scale.to_float, -128};
    }
    float32x4_t least = vdupq_n_f32(0.0f), largest = vdupq_n_f32(0.0f);
    for (int64_t half = 0; half < halves; ++half) {
        for (int q = 0; q < kQuads; ++q) {
            least = vminq_f32(least, values[half][q]);
            largest = vmaxq_f32(largest, values[half][q]);
        }
    }
    const ByteScale byte = byte_scale(vminvq_f32(least), vmaxvq_f32(largest));
    return {byte.to_integer, byte.to_float, byte.zero_point - 128};
}

AUTOQ_INLINE int32x4_t add_low_words(int32x4_t sum, const int32x4_t (&lanes)[kQuads]) {
    for (const int32x4_t& four : lanes) sum = vaddw_s16(sum, vmovn_s32(four));
    return sum;
}

AUTOQ_TARGET void prepare_tile_block(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                                     int64_t row, int64_t index, const int32_t* columns) {
    float32x4_t values[kBlockHalves][kQuads];
    const ColumnBlock& block = tiles.blocks[index];
    const int64_t halves = block.end - block.begin;
    uint32_t largest = load_block(weight, input, row, block.begin, block.end, values);
    if (tiles.rounding.mode == Mode::kInt8) {
        largest = take_outliers(tiles, row, block, reinterpret_cast<float*>(values), largest);
    }
    const TileScale scale = tile_scale(tiles, values, halves, largest);
    uint8_t order_bytes[kHalfColumns];
    for (int i = 0; i < kHalfColumns; ++i) order_bytes[i] = static_cast<uint8_t>(columns[i]);
    const uint8x16_t order = vld1q_u8(order_bytes);
    const int planes = tiles.planes / tiles.rounding.words;
    int32x4_t sums[kMaxWords] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    int8_t* out = reinterpret_cast<int8_t*>(tiles.row(row, block));
    for (int64_t half = 0; half < halves; ++half) {
        int32x4_t rest[kQuads];
        to_integers(values[half], scale.to_integer, rest);
        for (int word = 0; word < tiles.rounding.words; ++word) {
            sums[word] = add_low_words(sums[word], rest);
            int32x4_t low[kQuads], high[kQuads];
            for (int q = 0; q < kQuads; ++q) {
                low[q] = vaddq_s32(rest[q], vdupq_n_s32(scale.offset));
                high[q] = vshrq_n_s32(rest[q], 8);
            }
            vst1q_s8(out + tiles.half_offset(half, planes * word), low_bytes(low, order));
            if (planes == 2) vst1q_s8(out + tiles.half_offset(half, 2 * word + 1), low_bytes(high, order));
            drop_low<16>(rest);
        }
    }
    RowBlock* parameters = tiles.row_block(row, index);
    const float zero_point = static_cast<float>(scale.offset);
    parameters[0] = {scale.to_float, zero_point, vaddvq_s32(sums[0])};
    if (tiles.rounding.words == 2) parameters[1] = {scale.to_float * 65536.0f, zero_point, vaddvq_s32(sums[1])};
}

void prepare_tiles(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles, int64_t begin,
                   int64_t end) {
    prepare_each_tile_block(prepare_tile_block, weight, input, tiles, begin, end);
}

// ---- many rows: multiplication ------------------------------------------------------------------------------------

// One block of columns of 16 outputs as tiles.
template <int BITS>
AUTOQ_TARGET void unpack_block(const PackedWeight& weight, const ColumnBlock& block, int64_t row_block, uint8_t* tile,
                               OutputBlock& output) {
    for (int lanes = 0; lanes < kLanes; lanes += kWidth) {
        const int64_t parameters = (row_block * weight.groups + block.group) * kLanes + lanes;
        const int32x4_t zeros = load_zeros(weight.zeros + parameters);
        // What is subtracted from every code: its zero, except that differences of 8-bit codes need nine bits.
        const int32x4_t shifts = vsubq_s32(vdupq_n_s32(kCodeOffset<BITS>), zeros);
        const int32x4_t added = BITS == 8 ? vdupq_n_s32(0) : shifts;
        const int8x16_t centre = vreinterpretq_s8_s32(vmulq_n_s32(vandq_s32(added, vdupq_n_s32(255)), 0x01010101));
        vst1q_s32(output.shifts + lanes, BITS == 8 ? shifts : vdupq_n_s32(0));
        vst1q_f32(output.scales + lanes, load_four(weight.scales, Float::kFloat16, parameters));
        int32x4_t sums = vdupq_n_s32(0);
        int8_t* out = reinterpret_cast<int8_t*>(tile) + lanes * 4;
        for (int64_t half = block.begin; half < block.end; ++half) {
            int8x16_t unpacked[4];
            unpack_half<BITS>(weight.unit(row_block, 0) + lanes, half, unpacked);
            for (const int8x16_t& four : unpacked) {
                const int8x16_t bytes = vaddq_s8(four, centre);
                sums = vdotq_s32(sums, bytes, vdupq_n_s8(1));
                vst1q_s8(out, bytes);
                out += 64;
            }
        }
        vst1q_f32(output.sums + lanes, vcvtq_f32_s32(sums));
    }
}

void unpack_panel(const ActivationTiles& rows, const Panel& panel) {
    with_bits(panel.weight->bits, [&](auto bits) { unpack_blocks(unpack_block<bits>, rows, panel); });
}

// As many sums as leave registers for what is added to them.
AUTOQ_TARGET void multiply_outliers(const ActivationTiles& rows, const Panel& panel, int64_t row_block,
                                    const OutlierWeights& weights) {
    constexpr int kSums = 16;
    for (int64_t row = 0; row < rows.rows; ++row) {
        const Outlier* outliers = rows.row_outliers(row);
        for (int64_t first = 0; first < kOutlierBlocks * kLanes; first += kSums * kWidth) {
            float32x4_t sums[kSums];
            for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
            for (int64_t o = 0; o < rows.outlier_counts[row]; ++o) {
                const float* weight = weights.of_column(outliers[o].column) + first;
                for (int i = 0; i < kSums; ++i) {
                    sums[i] = vfmaq_n_f32(sums[i], vld1q_f32(weight + i * kWidth), outliers[o].value);
                }
            }
            for (int i = 0; i < kSums; ++i) {
                const int64_t lane = first + i * kWidth;
                vst1q_f32(panel.result(row, row_block + lane / kLanes) + lane % kLanes, sums[i]);
            }
        }
    }
}

// Adds the dot products of a plane of `ROWS` rows with 16 outputs over one block of columns.
template <int ROWS>
AUTOQ_INLINE void add_plane(const ActivationTiles& rows, const uint8_t* values, const uint8_t* weights, int64_t steps,
                            int32x4_t (&dots)[ROWS][kQuads]) {
    for (; steps > 0; steps -= 16, values += rows.planes * kTileBytes, weights += kTileBytes) {
        const int64_t tile_steps = steps < 16 ? steps : 16;
        for (int64_t step = 0; step < tile_steps; step += 4) {
            int8x16_t of_rows[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                of_rows[r] = vld1q_s8(reinterpret_cast<const int8_t*>(values) + r * 64 + step * 4);
            }
            for (int q = 0; q < kQuads; ++q) {
                int8x16_t four[4];
                for (int p = 0; p < 4; ++p) {
                    four[p] = vld1q_s8(reinterpret_cast<const int8_t*>(weights) + (step + p) * 64 + q * 16);
                }
                for (int r = 0; r < ROWS; ++r) dots[r][q] = add_dots(dots[r][q], four, of_rows[r]);
            }
        }
    }
}

// Adds what a block and word give 16 outputs of a row.
AUTOQ_INLINE void add_results(const int32x4_t (&dots)[kQuads], const RowBlock& of_row, const OutputBlock& output,
                              float* result) {
    for (int q = 0; q < kQuads; ++q) {
        const int lanes = q * kWidth;
        const int32x4_t sums = vcvtq_s32_f32(vld1q_f32(output.sums + lanes));
        int32x4_t dot = vmlsq_n_s32(dots[q], sums, static_cast<int32_t>(of_row.zero_point));
        dot = vmlaq_n_s32(dot, vld1q_s32(output.shifts + lanes), of_row.sum);
        const float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(dot), of_row.scale);
        const float32x4_t scales = vld1q_f32(output.scales + lanes);
        vst1q_f32(result + lanes, vfmaq_f32(vld1q_f32(result + lanes), value, scales));
    }
}

template <int ROWS>
AUTOQ_TARGET void multiply_rows(const ActivationTiles& rows, const Panel& panel, int64_t row, int64_t row_block) {
    const int planes = rows.planes / rows.rounding.words;
    for (int64_t i = panel.first_block; i < panel.last_block; ++i) {
        const ColumnBlock& block = rows.blocks[i];
        const uint8_t* weights = panel.tile(row_block, block);
        for (int word = 0; word < rows.rounding.words; ++word) {
            const uint8_t* low = rows.row(row, block) + planes * word * kTileBytes;
            int32x4_t dots[ROWS][kQuads];
            for (auto& of_row : dots)
                for (int32x4_t& dot : of_row) dot = vdupq_n_s32(0);
            if (planes == 2) {
                add_plane(rows, low + kTileBytes, weights, rows.steps(block), dots);
                for (auto& of_row : dots)
                    for (int32x4_t& dot : of_row) dot = vshlq_n_s32(dot, 8);
            }
            add_plane(rows, low, weights, rows.steps(block), dots);
            for (int r = 0; r < ROWS; ++r) {
                add_results(dots[r], rows.row_block(row + r, i)[word], panel.output(row_block, i),
                            panel.result(row + r, row_block));
            }
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
                store_results(vld1q_f32(panel.result(row, i) + lanes), *panel.weight, output, row,
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

// Four consecutive columns of one row: eighth `part` (0 .. 7) of a unit, `unit` pointing at the row's lane.
template <int BITS>
AUTOQ_INLINE uint32x4_t columns_of_row(const uint32_t* unit, int64_t part) {
    uint32_t fields;  // of one code after the other
    if constexpr (BITS == 3) {
        const int64_t half = part / 4, byte = part % 4 * 8;
        const uint32_t own = unit[half * kLanes] >> byte, shared = unit[2 * kLanes] >> (byte + half * 4);
        fields = (own & 63) | (shared & 7) << 6 | (own >> 6 & 3) << 9 | (shared >> 3 & 1) << 11;
    } else {
        fields = unit[(part * BITS / 8) * kLanes] >> (part * 4 * BITS % 32);
    }
    constexpr int32_t kShifts[4] = {0, -BITS, -2 * BITS, -3 * BITS};
    return vandq_u32(vshlq_u32(vdupq_n_u32(fields), vld1q_s32(kShifts)), vdupq_n_u32((1 << BITS) - 1));
}

template <int BITS, Float DTYPE>
AUTOQ_TARGET void dequantize_rows(const PackedWeight& weight, void* dense, int64_t row_block, int64_t rows,
                                  int64_t group, int64_t begin, int64_t end, int64_t out) {
    for (int64_t row = 0; row < rows; ++row, out += weight.in_features) {
        const int64_t parameters = (row_block * weight.groups + group) * kLanes + row;
        const float32x4_t zero = vdupq_n_f32(weight.zeros[parameters]);
        const float scale = half_to_float(weight.scales[parameters]);
        for (int64_t quad = begin * kQuads; quad < end * kQuads; ++quad) {
            const int64_t column = quad * kWidth;
            const uint32x4_t code = columns_of_row<BITS>(weight.unit(row_block, quad / 8) + row, quad % 8);
            const float32x4_t value = vmulq_n_f32(vsubq_f32(vcvtq_f32_u32(code), zero), scale);
            store_values(dense, DTYPE, out + column, weight.in_features - column, value);
        }
    }
}

void dequantize(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end) {
    with_bits(weight.bits, [&](auto bits) {
        with_dtype(dtype,
                   [&](auto type) { dequantize_blocks(dequantize_rows<bits, type>, weight, dense, begin, end); });
    });
}

}  // namespace

// NEON itself is part of every such processor, so that the portable kernels of a block are NEON's.
const Kernels neon_kernels = {kFewRows,       no_digit_tiles, prepare,         multiply, element,         prepare_tiles,
                              multiply_tiles, dequantize,     &portable_block, true,     &portable_search};

}  // namespace autoq::cpu

#endif
