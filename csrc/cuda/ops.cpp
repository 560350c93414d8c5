// The operators on CUDA. `linear` has no kernel here: its reference dequantizes and multiplies with torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../packed.h"
#include "dequantize.h"
#include "stream.h"

namespace autoq {
namespace {

Tensor dequantize_cuda(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
                       int64_t out_features, int64_t in_features, ScalarType dtype) {
    STD_TORCH_CHECK(is_supported_float(dtype),
                    "autoq::dequantize: the dtype must be float32, bfloat16 or float16; ask for one of them");
    const int32_t device = codes.get_device_index();
    STD_TORCH_CHECK(codes.is_cuda() && scales.is_cuda() && zeros.is_cuda() && scales.get_device_index() == device &&
                        zeros.get_device_index() == device,
                    "autoq::dequantize: codes, scales and zeros must be on the same CUDA device; move them there");
    const torch::stable::accelerator::DeviceGuard guard(device);
    const PackedTensors packed(codes, scales, zeros, bits, out_features, in_features);
    const Tensor dense = torch::stable::new_empty(packed.codes, {out_features, in_features}, dtype);
    const char* error = cuda::dequantize(packed.weight, dense.data_ptr(), float_of(dtype), current_stream(device));
    STD_TORCH_CHECK(error == nullptr, "autoq::dequantize: the CUDA kernel was not launched: ", error);
    return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CUDA, m) { m.impl("dequantize", TORCH_BOX(&dequantize_cuda)); }

}  // namespace autoq
