// Few rows on processors with matrix units (Intel AMX).
//
// The digits of the rows (fixed_point.h) are the rows of up to four tiles, so that the codes are unpacked once for all
// of them, and no vector instruction multiplies. Below five rows the AVX-512 kernel is faster: a product of tiles takes
// as long for one row as for eight.
#if defined(__x86_64__)

#include "amx.h"
#include "dispatch.h"

#define AUTOQ_TARGET AUTOQ_AMX
#define AUTOQ_INLINE AUTOQ_AMX __attribute__((always_inline)) inline

namespace autoq::cpu {
namespace {

constexpr int64_t kMaxBlockTiles = kBlockHalves / kTileHalves;
constexpr int64_t kFewestRows = 5;
// Steps between the unpacking of a block and the use of its sums, which gives the matrix unit and the memory between it
// and the vector units the time they take.
constexpr int64_t kStages = 2;

// One block of columns of 16 outputs on its way.
struct alignas(64) Stage {
    uint8_t weights[kMaxBlockTiles][kTileBytes];
    int32_t sums[kMaxDigitTiles][kTileRows][kLanes];
    const uint8_t* tiles;                  // `weights`, or the codes themselves where they are bytes already
    int64_t row_block, group, begin, end;  // halves
    int64_t block;                         // of the row
    int64_t block_tiles;
};

struct Work {
    Work(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output)
        : weight(weight), fixed(fixed), output(output) {}

    const PackedWeight& weight;
    const FixedPointRows& fixed;
    const OutputRows& output;
    Stage stages[kStages + 1];
    alignas(64) float results[kFewRowsAmx][kLanes];
};

template <int BITS>
AUTOQ_INLINE void unpack(const PackedWeight& weight, Stage& stage) {
    const uint32_t* codes = weight.unit(stage.row_block, 0);
    const int64_t halves = stage.end - stage.begin;
    stage.block_tiles = (halves + kTileHalves - 1) / kTileHalves;
    if constexpr (BITS == 8) {
        if (halves % kTileHalves == 0) {
            for (int64_t half = stage.begin; half < stage.end; ++half) prefetch_half<BITS>(codes, half);
            stage.tiles = reinterpret_cast<const uint8_t*>(codes + stage.begin * 4 * kLanes);
            return;
        }
    }
    stage.tiles = stage.weights[0];
    for (int64_t half = stage.begin; half < stage.end; ++half) {
        __m512i unpacked[4];
        prefetch_half<BITS>(codes, half);
        unpack_half<BITS>(codes, half, unpacked);
        uint8_t* out = stage.weights[0] + (half - stage.begin) * 4 * 64;
        for (int p = 0; p < 4; ++p) _mm512_store_si512(out + p * 64, unpacked[p]);
    }
}

// Tile registers are named by literals: 0 to 3 are sums, 4 and 5 take digits in turn, 6 codes.
template <int TILES>
AUTOQ_INLINE void multiply(const FixedPointRows& fixed, Stage& stage) {
    const int8_t* digits[TILES];
    for (int t = 0; t < TILES; ++t) digits[t] = fixed.tile(stage.block, t);
    const int64_t step = fixed.tile_bytes();
    asm volatile("" ::: "memory");  // GCC does not know that loading tiles reads memory
    _tile_zero(0);
    if constexpr (TILES > 1) _tile_zero(1);
    if constexpr (TILES > 2) _tile_zero(2);
    if constexpr (TILES > 3) _tile_zero(3);
    for (int64_t i = 0; i < stage.block_tiles; ++i) {
        _tile_loadd(6, stage.tiles + i * kTileBytes, 64);
        _tile_loadd(4, digits[0] + i * step, 64);
        _tile_dpbsud(0, 4, 6);
        if constexpr (TILES > 1) {
            _tile_loadd(5, digits[1] + i * step, 64);
            _tile_dpbsud(1, 5, 6);
        }
        if constexpr (TILES > 2) {
            _tile_loadd(4, digits[2] + i * step, 64);
            _tile_dpbsud(2, 4, 6);
        }
        if constexpr (TILES > 3) {
            _tile_loadd(5, digits[3] + i * step, 64);
            _tile_dpbsud(3, 5, 6);
        }
    }
    _tile_stored(0, stage.sums[0], 64);
    if constexpr (TILES > 1) _tile_stored(1, stage.sums[1], 64);
    if constexpr (TILES > 2) _tile_stored(2, stage.sums[2], 64);
    if constexpr (TILES > 3) _tile_stored(3, stage.sums[3], 64);
}

// Adds a block's sums to the results, which are stored with the last block.
template <int DIGITS>
AUTOQ_INLINE void finish(Work& work, const Stage& stage) {
    const FixedPointRows& fixed = work.fixed;
    const __m512 zero = load_zeros(work.weight, stage.row_block, stage.group);
    const __m512 scale = load_scales(work.weight, stage.row_block, stage.group);
    const bool first = stage.block == 0, last = stage.block == fixed.blocks - 1;
    for (int64_t tile = 0, row = 0; row < fixed.rows; ++tile) {
        for (int64_t r = 0; r < fixed.tile_rows && row < fixed.rows; ++r, ++row) {
            __m512i dots[DIGITS];
            for (int d = 0; d < DIGITS; ++d) dots[d] = _mm512_load_si512(stage.sums[tile][r * DIGITS + d]);
            __m512 result = first ? _mm512_setzero_ps() : _mm512_load_ps(work.results[row]);
            result = add_digits<DIGITS>(result, dots, fixed, row * fixed.blocks + stage.block, zero, scale);
            if (last) {
                store_results(result, work.weight, work.output, row, stage.row_block);
            } else {
                _mm512_store_ps(work.results[row], result);
            }
        }
    }
}

template <int BITS, int DIGITS, int TILES>
AUTOQ_TARGET void multiply_blocks(Work& work, int64_t begin, int64_t end) {
    const PackedWeight& weight = work.weight;
    const int64_t halves = weight.group_halves(), blocks_in_group = blocks_per_group(weight);
    const int64_t steps = (end - begin) * work.fixed.blocks;
    int64_t row_block = begin, group = 0, block = 0, in_group = 0;
    for (int64_t step = 0; step < steps + kStages; ++step) {
        if (step < steps) {
            Stage& stage = work.stages[step % (kStages + 1)];
            stage.row_block = row_block;
            stage.group = group;
            stage.block = block;
            stage.begin = group * halves + in_group * kBlockHalves;
            stage.end = std::min(stage.begin + kBlockHalves, (group + 1) * halves);
            unpack<BITS>(weight, stage);
            ++block;
            if (++in_group == blocks_in_group) in_group = 0, ++group;
            if (group == weight.groups) group = block = 0, ++row_block;
        }
        if (step >= 1 && step <= steps) multiply<TILES>(work.fixed, work.stages[(step - 1) % (kStages + 1)]);
        if (step >= kStages) finish<DIGITS>(work, work.stages[(step - kStages) % (kStages + 1)]);
    }
}

template <int BITS, int DIGITS>
void multiply_row_tiles(Work& work, int64_t begin, int64_t end) {
    switch (work.fixed.row_tiles()) {
        case 1:
            return multiply_blocks<BITS, DIGITS, 1>(work, begin, end);
        case 2:
            return multiply_blocks<BITS, DIGITS, 2>(work, begin, end);
        case 3:
            return multiply_blocks<BITS, DIGITS, 3>(work, begin, end);
        default:
            return multiply_blocks<BITS, DIGITS, 4>(work, begin, end);
    }
}

// Configurations for tiles of so many rows of digits.
struct Configurations {
    TileConfiguration of[kTileRows + 1];
    Configurations() {
        for (int rows = 0; rows <= kTileRows; ++rows) {
            for (int tile = 0; tile < 6; ++tile) of[rows].rows[tile] = static_cast<uint8_t>(rows);
        }
    }
};

}  // namespace

int64_t digit_tile_rows_amx(int64_t rows, int digits) {
    if (rows < kFewestRows) return 0;
    const int64_t most = kTileRows / digits, tiles = (rows + most - 1) / most;
    return (rows + tiles - 1) / tiles;  // as many in every tile
}

AUTOQ_TARGET void multiply_few_amx(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output,
                                   int64_t begin, int64_t end) {
    if (fixed.tile_rows == 0) return multiply_avx512(weight, fixed, output, begin, end);
    static const Configurations configurations;
    static thread_local Scratch scratch;
    Work& work = *new (scratch.get(sizeof(Work))) Work(weight, fixed, output);
    _tile_loadconfig(&configurations.of[fixed.tile_rows * fixed.digits]);
    with_bits(weight.bits, [&](auto bits) {
        with_digits(fixed.digits, [&](auto digits) { multiply_row_tiles<bits, digits>(work, begin, end); });
    });
    _tile_release();  // a thread with tiles in use is slower to switch, and its core to rest
}

}  // namespace autoq::cpu

#endif
