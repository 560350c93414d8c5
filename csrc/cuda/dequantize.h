// The CUDA kernels' door: pointers, sizes and a stream, no torch.
#pragma once

#include "../layout.h"

namespace autoq::cuda {

// Writes the dense weight, row-major [out_features, in_features], on the stream (a cudaStream_t). Returns null, or the
// message of the launch's error.
const char* dequantize(const PackedWeight& weight, void* dense, Float dtype, void* stream);

}  // namespace autoq::cuda
