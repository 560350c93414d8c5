// Linears that are not quantized, on the CPU. The schema and the reference are in autoq/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "packed.h"
#include "team.h"

namespace autoq {
namespace {

// Rows that go through the weight together: in fp32 they stay in the second-level cache.
constexpr int64_t kRowsAtATime = 32;
// Outputs that a thread takes at once: the input is made fp32 again for each range, which so many products outweigh.
constexpr int64_t kOutputsAtATime = 64;

void check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(is_supported_float(input.scalar_type()),
                    "autoq::dense_linear: input must be float32, bfloat16 or float16; convert it to one of them");
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(1) > 0 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1),
        "autoq::dense_linear: weight must have the shape [outputs, columns], and input [..., columns]");
    STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type() && weight.is_cpu() && input.is_cpu(),
                    "autoq::dense_linear: input and weight must have one dtype and be on the CPU");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_cpu() &&
                              bias->scalar_type() == input.scalar_type()),
                    "autoq::dense_linear: bias must have the shape [outputs], and the dtype and device of the input");
}

Tensor dense_linear(const Tensor& input_, const Tensor& weight_, const std::optional<Tensor>& bias_) {
    check(input_, weight_, bias_);
    const Tensor input = make_contiguous(input_), weight = make_contiguous(weight_);
    std::optional<Tensor> bias;
    if (bias_) bias = make_contiguous(*bias_);
    const int64_t columns = weight.size(1), outputs = weight.size(0);
    std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
    shape.back() = outputs;
    Tensor out = torch::stable::new_empty(input, shape);
    const int64_t rows = static_cast<int64_t>(input.numel()) / columns;
    const int64_t item_bytes = input.element_size();
    for (int64_t row = 0; row < rows; row += kRowsAtATime) {
        const cpu::DenseProduct product{static_cast<const char*>(input.data_ptr()) + row * columns * item_bytes,
                                        weight.data_ptr(),
                                        bias ? bias->data_ptr() : nullptr,
                                        static_cast<char*>(out.data_ptr()) + row * outputs * item_bytes,
                                        float_of(input.scalar_type()),
                                        std::min(rows - row, kRowsAtATime),
                                        columns,
                                        outputs};
        const auto multiply = cpu::kernels().block->multiply_dense;
        parallel_for(0, (outputs + kOutputsAtATime - 1) / kOutputsAtATime, 1, [&](int64_t begin, int64_t end) {
            multiply(product, begin * kOutputsAtATime, std::min(end * kOutputsAtATime, outputs));
        });
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) { m.impl("dense_linear", TORCH_BOX(&dense_linear)); }

}  // namespace autoq
