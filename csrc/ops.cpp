// The operators on the CPU. Their schemas, their reference in plain torch and their autograd are in autoq/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "cpu/kernels.h"
#include "ops.h"

namespace autoq {
namespace {

// Up to this many input rows, each is multiplied with the codes directly; more rows are multiplied with panels of
// dequantized weights. Directly, every row costs the same. Panels cost the dequantization, as much as 10 to 20 rows,
// and then what torch's matmul costs: in bf16 as much as 15 to 20 rows, and little more for each further row, because
// matrix units do the work; in fp32 slightly less than the same rows directly. On a Sapphire Rapids class core (4 bits,
// 4096 x 11008) the lines cross between 28 and 40 rows in bf16, and between 60 and 120 in fp32.
constexpr int64_t kDirectRowsBFloat16 = 32;
constexpr int64_t kDirectRowsFloat32 = 64;

// Panels of about this size stay in the caches between dequantization and multiplication, and are large enough that
// threads meet rarely.
constexpr int64_t kPanelBytes = 8 << 20;

// Below this many multiplications a thread is not worth waking.
constexpr int64_t kProductsPerThread = 1 << 18;

// Memory that a thread keeps between calls: one token makes hundreds of calls, and none should allocate.
void* scratch(size_t bytes) {
    constexpr size_t kAlignment = 64;
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t capacity = 0;
    if (capacity < bytes) {
        memory.reset();
        memory.reset(new char[bytes + kAlignment]);
        capacity = bytes;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<void*>((address + kAlignment - 1) & ~(kAlignment - 1));
}

int64_t grain(int64_t products_per_item) {
    return std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_per_item));
}

cpu::FixedPointRows fixed_point_rows(const PackedWeight& weight, const cpu::InputRows& input) {
    cpu::FixedPointRows fixed{};
    fixed.rows = input.rows;
    fixed.digits = cpu::digits_for(input.dtype);
    fixed.halves = weight.units * 2;
    fixed.blocks = weight.groups * cpu::blocks_per_group(weight);
    const int64_t values = fixed.rows * fixed.halves * fixed.digits * kHalfColumns;
    const int64_t scales = fixed.rows * fixed.blocks;
    char* memory = static_cast<char*>(scratch(values + 4 * scales * (1 + fixed.digits)));
    fixed.values = reinterpret_cast<int8_t*>(memory);
    fixed.scales = reinterpret_cast<float*>(memory + values);
    fixed.sums = fixed.scales + scales;
    return fixed;
}

void multiply_direct(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output) {
    const cpu::Kernels& kernels = cpu::kernels();
    const cpu::FixedPointRows fixed = fixed_point_rows(weight, input);
    const int64_t columns = weight.units * kUnitColumns;
    // Preparing a value costs about as much as a hundred products.
    torch::stable::parallel_for(0, input.rows, grain(columns * 100),
                                [&](int64_t begin, int64_t end) { kernels.prepare(weight, input, fixed, begin, end); });
    torch::stable::parallel_for(
        0, weight.row_blocks, grain(columns * kLanes * input.rows),
        [&](int64_t begin, int64_t end) { kernels.multiply(weight, fixed, output, begin, end); });
}

// aten::linear.out on two-dimensional tensors.
void linear_out(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
    std::array<StableIValue, 4> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
}

void dequantize_into(const PackedWeight& weight, const Tensor& dense, int64_t first_block, int64_t last_block) {
    const cpu::Kernels& kernels = cpu::kernels();
    const Float dtype = float_of(dense.scalar_type());
    char* data = static_cast<char*>(dense.data_ptr());
    const int64_t block_bytes = kLanes * weight.in_features * static_cast<int64_t>(dense.element_size());
    torch::stable::parallel_for(
        first_block, last_block, grain(kLanes * weight.in_features * 8), [&](int64_t begin, int64_t end) {
            kernels.dequantize(weight, data + (begin - first_block) * block_bytes, dtype, begin, end);
        });
}

// Many rows: the weight is dequantized a panel of output rows at a time, so that memory holds the codes and one panel.
void multiply_panels(const PackedWeight& weight, const Tensor& input, const std::optional<Tensor>& bias, Tensor& out) {
    const int64_t row_bytes = weight.in_features * static_cast<int64_t>(input.element_size());
    const int64_t panel_blocks =
        std::clamp<int64_t>(kPanelBytes / (row_bytes * kLanes), 1, std::max<int64_t>(1, weight.row_blocks));
    Tensor panel = torch::stable::new_empty(input, {panel_blocks * kLanes, weight.in_features});
    for (int64_t block = 0; block < weight.row_blocks; block += panel_blocks) {
        const int64_t last = std::min(block + panel_blocks, weight.row_blocks);
        const int64_t first_row = block * kLanes;
        const int64_t rows = std::min(last * kLanes, weight.out_features) - first_row;
        dequantize_into(weight, panel, block, last);
        std::optional<Tensor> panel_bias;
        if (bias) {
            Tensor whole = *bias;
            panel_bias = torch::stable::narrow(whole, 0, first_row, rows);
        }
        linear_out(input, torch::stable::narrow(panel, 0, 0, rows), panel_bias,
                   torch::stable::narrow(out, 1, first_row, rows));
    }
}

// The dtype in which panels are multiplied: bf16 only where the processor multiplies it natively, and never fp16, whose
// products overflow where the exact result does not.
ScalarType panel_dtype(ScalarType input) {
    return input == ScalarType::BFloat16 && cpu::has_bf16_units() ? ScalarType::BFloat16 : ScalarType::Float;
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& input, int64_t out_features) {
    if (!bias) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "autoq::linear: bias must have the shape [",
                    out_features, "], one value for each output feature");
    STD_TORCH_CHECK(bias->scalar_type() == input.scalar_type(),
                    "autoq::linear: bias must have the dtype of the input; convert it");
    STD_TORCH_CHECK(bias->is_cpu(), "autoq::linear: bias must be on the CPU, as the input is; move it there");
}

}  // namespace

Tensor linear(const Tensor& input_, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
              const std::optional<Tensor>& bias_, int64_t bits, int64_t out_features) {
    STD_TORCH_CHECK(input_.dim() >= 1, "autoq::linear: input must have at least one dimension, the features");
    STD_TORCH_CHECK(input_.is_cpu(), "autoq::linear: input must be on the CPU, as the weight is; move it there");
    const ScalarType dtype = input_.scalar_type();
    STD_TORCH_CHECK(is_supported_float(dtype),
                    "autoq::linear: input must be float32, bfloat16 or float16; convert it to one of them");
    const int64_t in_features = input_.size(input_.dim() - 1);
    const PackedTensors packed(codes, scales, zeros, bits, out_features, in_features);
    packed.check_on_cpu();
    check_bias(bias_, input_, out_features);

    const Tensor input = make_contiguous(input_);
    std::optional<Tensor> bias;
    if (bias_) bias = make_contiguous(*bias_);
    std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
    shape.back() = out_features;
    Tensor out = torch::stable::new_empty(input, shape);
    const int64_t rows = input.numel() / in_features;
    if (rows == 0) return out;
    const ScalarType compute = panel_dtype(dtype);
    if (rows <= (compute == ScalarType::BFloat16 ? kDirectRowsBFloat16 : kDirectRowsFloat32)) {
        multiply_direct(packed.weight, {input.data_ptr(), float_of(dtype), rows},
                        {out.data_ptr(), float_of(dtype), out_features, bias ? bias->data_ptr() : nullptr});
        return out;
    }
    if (bias) bias = torch::stable::to(*bias, compute);
    const Tensor matrix = torch::stable::to(torch::stable::view(input, {rows, in_features}), compute);
    Tensor result = compute == dtype ? torch::stable::view(out, {rows, out_features})
                                     : torch::stable::new_empty(matrix, {rows, out_features});
    multiply_panels(packed.weight, matrix, bias, result);
    if (compute == dtype) return out;
    return torch::stable::view(torch::stable::to(result, dtype), shape);
}

namespace {

Tensor dequantize(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t bits, int64_t out_features,
                  int64_t in_features, ScalarType dtype) {
    STD_TORCH_CHECK(is_supported_float(dtype),
                    "autoq::dequantize: the dtype must be float32, bfloat16 or float16; ask for one of them");
    const PackedTensors packed(codes, scales, zeros, bits, out_features, in_features);
    packed.check_on_cpu();
    Tensor dense = torch::stable::new_empty(packed.codes, {out_features, in_features}, dtype);
    dequantize_into(packed.weight, dense, 0, packed.weight.row_blocks);
    return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace autoq
