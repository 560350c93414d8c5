// What the kernels for processors with matrix units (Intel AMX) share.
#pragma once

#include "avx512.h"

#define AUTOQ_AMX \
    __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

namespace autoq::cpu {

// The eight tile registers. To be kept in static or volatile memory: GCC believes that the instruction that reads it
// reads eight bytes, and may leave out writing the others.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {0};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Up to how many rows are few.
constexpr int64_t kFewRowsAmx = 16;
static_assert(kFewRowsAmx * kMaxDigits <= kMaxDigitTiles * kTileRows);

int64_t digit_tile_rows_amx(int64_t rows, int digits);
void multiply_few_amx(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                      int64_t end);

}  // namespace autoq::cpu
