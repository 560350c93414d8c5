// The parts of the AVX-512 kernels that processors with matrix units use as well.
#pragma once

#include "kernels.h"

namespace autoq::cpu {

void prepare_avx512(const PackedWeight& weight, const InputRows& input, const FixedPointRows& fixed, int64_t begin,
                    int64_t end);
void multiply_avx512(const PackedWeight& weight, const FixedPointRows& fixed, const OutputRows& output, int64_t begin,
                     int64_t end);
void dequantize_avx512(const PackedWeight& weight, void* dense, Float dtype, int64_t begin, int64_t end);

// Many rows, of bytes or words.
void prepare_tiles_avx512(const PackedWeight& weight, const InputRows& input, const ActivationTiles& tiles,
                          int64_t begin, int64_t end);
void unpack_panel_avx512(const ActivationTiles& rows, const Panel& panel);
void store_panel_avx512(const ActivationTiles& rows, const Panel& panel, const OutputRows& output);

}  // namespace autoq::cpu
