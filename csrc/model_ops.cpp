// The operators around the decoder blocks, but for what a device does: their checks and their results. Their schemas
// and their reference in plain torch are in autoq/model_ops.py.
#include <optional>
#include <tuple>
#include <vector>

#include "block_device.h"

namespace autoq {
namespace {

// A vector of a norm where it is; null where there is none.
const void* vector_of(const BlockDevice& device, const std::optional<Tensor>& vector, const Buffer& input,
                      const char* name) {
    if (!vector) return nullptr;
    STD_TORCH_CHECK(device.holds(*vector) && vector->scalar_type() == input.tensor.scalar_type() &&
                        vector->dim() == 1 && vector->size(0) == input.columns && vector->is_contiguous(),
                    "autoq::norm: the ", name, " must be a contiguous vector of ", input.columns, " values on ",
                    device.name(), " in the dtype of the input");
    return vector->data_ptr();
}

}  // namespace

Tensor norm(const BlockDevice& device, const Tensor& input_, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, int64_t kind, double epsilon) {
    STD_TORCH_CHECK(device.holds(input_) && is_supported_float(input_.scalar_type()) && input_.dim() >= 1,
                    "autoq::norm: the input must be float32, bfloat16 or float16 [..., features] on ", device.name());
    STD_TORCH_CHECK(kind == 0 || kind == 1, "autoq::norm: the kind must be 0, a layer norm, or 1, an RMS norm, not ",
                    kind);
    const Buffer input(make_contiguous(input_));
    const Norm norm{static_cast<NormKind>(kind), vector_of(device, weight, input, "weight"),
                    vector_of(device, bias, input, "bias"), static_cast<float>(epsilon)};
    const Buffer output(torch::stable::empty_like(input.tensor));
    if (input.tensor.numel() > 0) device.norm(norm, input, output);
    return output.tensor;
}

std::tuple<Tensor, Tensor> rotary_tables(const BlockDevice& device, const Tensor& positions_,
                                         const Tensor& frequencies_, double scale, ScalarType dtype) {
    STD_TORCH_CHECK(device.holds(positions_) && positions_.scalar_type() == ScalarType::Long && positions_.dim() == 2,
                    "autoq::rotary_tables: positions must be int64 [batch, tokens] on ", device.name());
    STD_TORCH_CHECK(
        device.holds(frequencies_) && frequencies_.scalar_type() == ScalarType::Float && frequencies_.dim() == 1,
        "autoq::rotary_tables: frequencies must be float32 [angles] on ", device.name());
    STD_TORCH_CHECK(is_supported_float(dtype),
                    "autoq::rotary_tables: the dtype must be float32, bfloat16 or float16; ask for one of them");
    const Tensor positions = make_contiguous(positions_), frequencies = make_contiguous(frequencies_);
    const std::vector<int64_t> shape{positions.size(0), positions.size(1), 2 * frequencies.size(0)};
    const Tensor cosines = torch::stable::new_empty(frequencies, shape, dtype);
    const Tensor sines = torch::stable::new_empty(frequencies, shape, dtype);
    if (cosines.numel() > 0) {
        device.rotary_tables({static_cast<const int64_t*>(positions.data_ptr()),
                              static_cast<int64_t>(positions.numel()),
                              static_cast<const float*>(frequencies.data_ptr()), frequencies.size(0),
                              static_cast<float>(scale), float_of(dtype), cosines.data_ptr(), sines.data_ptr()});
    }
    return {cosines, sines};
}

}  // namespace autoq
