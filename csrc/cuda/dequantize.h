// The CUDA kernels' door: pointers, sizes and a stream, no torch.
#pragma once

#include "../layout.h"

namespace autoq::cuda {

// Writes the dense weight, row-major [out_features, in_features] and aligned to 16 bytes, on the stream (a
// cudaStream_t). Returns null, or what went wrong.
const char* dequantize(const PackedWeight& weight, void* dense, Float dtype, void* stream);

}  // namespace autoq::cuda
