// The operators on CUDA. Their schemas, their reference in plain torch and their autograd are in autoq/ops.py.
#include "ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "../packed.h"
#include "counters.h"
#include "dequantize.h"
#include "linear.h"
#include "stream.h"

namespace autoq {
namespace {

// Weights dequantized at a time, so that a large layer needs no dense copy of itself.
constexpr int64_t kDenseWeights = int64_t{1} << 28;

void check_launched(const char* error, const char* name) {
    STD_TORCH_CHECK(error == nullptr, "autoq::", name, ": the CUDA kernel was not launched: ", error);
}

void check_on_device(const char* name, const Tensor& codes, const Tensor& scales, const Tensor& zeros) {
    STD_TORCH_CHECK(codes.is_cuda() && scales.device() == codes.device() && zeros.device() == codes.device(),
                    "autoq::", name, ": codes, scales and zeros must be on the same CUDA device; move them there");
}

// The kernels read 16 bytes at a time.
Tensor make_aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 ? torch::stable::clone(tensor) : tensor;
}

PackedTensors make_packed(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
                          int64_t out_features, int64_t in_features) {
    return {make_aligned(make_contiguous(codes)),
            make_aligned(make_contiguous(scales)),
            make_aligned(make_contiguous(zeros)),
            bits,
            out_features,
            in_features};
}

// ---- many rows: torch multiplies ------------------------------------------------------------------------------------

Tensor dense_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// The product with some blocks of the weight's rows, dense for the moment.
Tensor multiply_dense(const PackedTensors& packed, const Tensor& input, const std::optional<Tensor>& bias,
                      int64_t first, int64_t blocks, void* stream) {
    const PackedWeight part = packed.blocks(first, blocks);
    const Tensor dense = torch::stable::new_empty(input, {part.out_features, part.in_features});
    check_launched(cuda::dequantize(part, dense.data_ptr(), float_of(input.scalar_type()), stream), "linear");
    std::optional<Tensor> part_bias;
    if (bias) {
        Tensor whole = *bias;
        part_bias = torch::stable::narrow(whole, 0, first * kLanes, part.out_features);
    }
    return dense_linear(input, dense, part_bias);
}

Tensor multiply_many(const PackedTensors& packed, const Tensor& input, const std::optional<Tensor>& bias,
                     void* stream) {
    const PackedWeight& weight = packed.weight;
    const int64_t step = std::max<int64_t>(1, kDenseWeights / (weight.in_features * kLanes));
    if (step >= weight.row_blocks) return multiply_dense(packed, input, bias, 0, weight.row_blocks, stream);
    Tensor out = torch::stable::new_empty(input, {input.size(0), weight.out_features});
    for (int64_t first = 0; first < weight.row_blocks; first += step) {
        const Tensor part =
            multiply_dense(packed, input, bias, first, std::min(step, weight.row_blocks - first), stream);
        Tensor place = torch::stable::narrow(out, 1, first * kLanes, part.size(1));
        torch::stable::copy_(place, part);
    }
    return out;
}

// ---- few rows: our kernels ------------------------------------------------------------------------------------------

Tensor multiply_few(const PackedTensors& packed, const Tensor& input_, const std::optional<Tensor>& bias_,
                    const cuda::LinearPlan& plan, bool overlaps, void* stream) {
    const PackedWeight& weight = packed.weight;
    // Rows must start at multiples of 16 bytes.
    const int64_t columns = weight.in_features % 8 ? weight.units * kUnitColumns : weight.in_features;
    const int64_t padding[] = {0, columns - weight.in_features};
    const Tensor input = make_aligned(padding[1] ? torch::stable::pad(input_, {padding, 2}) : input_);
    std::optional<Tensor> bias;
    if (bias_) bias = make_contiguous(*bias_);
    const Tensor out = torch::stable::new_empty(input, {input.size(0), weight.out_features});

    uint32_t* counters = nullptr;
    if (!plan.whole_tiles) check_launched(cuda::counters_for(stream, counters), "linear");
    std::optional<Tensor> workspace;
    if (const int64_t bytes = cuda::linear_workspace(plan, weight, input.size(0))) {
        workspace = torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
    }
    const cuda::LinearProblem problem{weight,  float_of(input.scalar_type()),     input.data_ptr(), input.size(0),
                                      columns, bias ? bias->data_ptr() : nullptr, out.data_ptr(),   overlaps};
    check_launched(cuda::linear(problem, plan, workspace ? workspace->data_ptr() : nullptr, counters, stream),
                   "linear");
    return out;
}

// ---- the operators --------------------------------------------------------------------------------------------------

// What both ways to multiply begin with.
struct Multiplication {
    PackedTensors packed;
    Tensor input;  // [rows, in_features], contiguous
    std::vector<int64_t> shape;
    void* stream;

    Multiplication(const Tensor& input_, const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
                   int64_t out_features)
        : packed(make_packed(codes, scales, zeros, bits, out_features, input_.size(input_.dim() - 1))),
          input(torch::stable::view(
              make_contiguous(input_),
              {static_cast<int64_t>(input_.numel()) / packed.weight.in_features, packed.weight.in_features})),
          shape(input_.sizes().begin(), input_.sizes().end()),
          stream(current_stream(codes.get_device_index())) {
        shape.back() = out_features;
    }

    bool can_be_few() const { return input.scalar_type() != ScalarType::Float && cuda::linear_takes(packed.weight); }

    Tensor in_shape(const Tensor& out) const { return torch::stable::view(out, {shape.data(), shape.size()}); }
};

}  // namespace

Tensor linear_cuda(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                   const std::optional<Tensor>& bias, int64_t bits, int64_t out_features, bool overlaps) {
    check_on_device("linear", codes, scales, zeros);
    STD_TORCH_CHECK(input.device() == codes.device(),
                    "autoq::linear: input must be on the CUDA device of the weight; move it there");
    const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
    const Multiplication m(input, codes, scales, zeros, bits, out_features);
    const int64_t rows = m.input.size(0);
    if (rows == 0) return torch::stable::new_empty(input, {m.shape.data(), m.shape.size()});
    if (rows > cuda::kMostLinearRows || !m.can_be_few()) {
        return m.in_shape(multiply_many(m.packed, m.input, bias, m.stream));
    }
    cuda::LinearPlan plan;
    check_launched(cuda::plan_linear(m.packed.weight, rows, plan), "linear");
    // A copy may have been made by the kernel directly before.
    overlaps = overlaps && !m.packed.copies(codes, scales, zeros);
    return m.in_shape(multiply_few(m.packed, m.input, bias, plan, overlaps, m.stream));
}

namespace {

// The mode is about the CPU: here, products are exact and their sums fp32, in either.
Tensor linear(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
              const std::optional<Tensor>& bias, int64_t bits, int64_t out_features, const std::string& mode) {
    check_linear(input, bias, out_features, mode);
    const bool overlaps = false;  // what ran before is not known
    return linear_cuda(input, codes, scales, zeros, bias, bits, out_features, overlaps);
}

// linear by our kernels with a plan of the caller's choice, for benchmarks/tune_linear.py alone.
Tensor linear_with_plan(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                        int64_t bits, int64_t out_features, int64_t row_tiles, int64_t warps_across, int64_t slices,
                        int64_t blocks, bool whole_tiles, bool warpgroups) {
    check_linear(input, std::nullopt, out_features, "exact");
    check_on_device("linear_with_plan", codes, scales, zeros);
    STD_TORCH_CHECK(input.device() == codes.device(), "autoq::linear_with_plan: input must be on the weight's device");
    const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
    const Multiplication m(input, codes, scales, zeros, bits, out_features);
    STD_TORCH_CHECK(m.can_be_few() && m.input.size(0) > 0, "autoq::linear_with_plan: the kernels do not take this");
    const cuda::LinearPlan plan{static_cast<int>(row_tiles),
                                static_cast<int>(warps_across),
                                static_cast<int>(slices),
                                static_cast<int>(blocks),
                                whole_tiles,
                                warpgroups};
    STD_TORCH_CHECK(cuda::is_possible(plan, static_cast<int>(bits)), "autoq::linear_with_plan: there is no such plan");
    const bool overlaps = false;
    return m.in_shape(multiply_few(m.packed, m.input, std::nullopt, plan, overlaps, m.stream));
}

Tensor dequantize_cuda(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits,
                       int64_t out_features, int64_t in_features, ScalarType dtype) {
    STD_TORCH_CHECK(is_supported_float(dtype),
                    "autoq::dequantize: the dtype must be float32, bfloat16 or float16; ask for one of them");
    check_on_device("dequantize", codes, scales, zeros);
    const int32_t device = codes.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const PackedTensors packed = make_packed(codes, scales, zeros, bits, out_features, in_features);
    const Tensor dense = torch::stable::new_empty(packed.codes, {out_features, in_features}, dtype);
    check_launched(cuda::dequantize(packed.weight, dense.data_ptr(), float_of(dtype), current_stream(device)),
                   "dequantize");
    return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(autoq, m) {
    m.def(
        "linear_with_plan(Tensor input, Tensor codes, Tensor scales, Tensor zeros, int bits, int out_features, "
        "int row_tiles, int warps_across, int slices, int blocks, bool whole_tiles, bool warpgroups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autoq, CUDA, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_with_plan", TORCH_BOX(&linear_with_plan));
    m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
}

}  // namespace autoq
