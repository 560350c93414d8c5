// The operators on the CPU. Their schemas, their reference in plain torch and their autograd are in autoq/ops.py.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/digits.h"
#include "cpu/dispatch.h"
#include "packed.h"
#include "team.h"

namespace autoq {
namespace {

// Rows are made into tiles so many at a time: their results for a panel of outputs lie in the second-level cache, and
// unpacking the weight again for each part costs a few percent.
constexpr int64_t kRowsAtATime = 512;

// Below this many multiplications a thread is not worth waking.
constexpr int64_t kProductsPerThread = 1 << 18;

int64_t grain(int64_t products_per_item) {
    return std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_per_item));
}

cpu::Scratch& scratch() {
    static thread_local cpu::Scratch memory;
    return memory;
}

void multiply_rows(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output, int digits) {
    const cpu::Kernels& kernels = cpu::kernels();
    const cpu::FixedPointRows fixed = cpu::fixed_point_rows(weight, input, digits, kernels, scratch());
    const int64_t columns = weight.units * kUnitColumns;
    // Preparing a value costs about as much as a hundred products.
    parallel_for(0, input.rows, grain(columns * 100),
                 [&](int64_t begin, int64_t end) { kernels.prepare(weight, input, fixed, begin, end); });
    parallel_for(0, weight.row_blocks, grain(columns * kLanes * input.rows),
                 [&](int64_t begin, int64_t end) { kernels.multiply(weight, fixed, output, begin, end); });
}

// Some of the rows of an input and of its output.
std::pair<cpu::InputRows, cpu::OutputRows> part(const PackedWeight& weight, const cpu::InputRows& input,
                                                const cpu::OutputRows& output, int64_t begin, int64_t end) {
    const int64_t bytes = input.dtype == Float::kFloat32 ? 4 : 2;
    const char* rows = static_cast<const char*>(input.data) + begin * weight.in_features * bytes;
    char* results = static_cast<char*>(output.data) + begin * output.stride * bytes;
    return {{rows, input.dtype, end - begin}, {results, output.dtype, output.stride, output.bias}};
}

// Few rows, neighbours with as many digits together.
void multiply_few(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output) {
    int next = cpu::digits_for_row(weight, input, 0);
    for (int64_t begin = 0, end = 1; begin < input.rows; begin = end++) {
        const int digits = next;
        while (end < input.rows && (next = cpu::digits_for_row(weight, input, end)) == digits) ++end;
        const auto [rows, results] = part(weight, input, output, begin, end);
        multiply_rows(weight, rows, results, digits);
    }
}

void multiply_tiles(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output,
                    cpu::Mode mode) {
    const cpu::Kernels& kernels = cpu::kernels();
    const cpu::ActivationTiles tiles = cpu::activation_tiles(weight, input, mode, kernels, scratch());
    parallel_for(0, input.rows, grain(weight.in_features * 100),
                 [&](int64_t begin, int64_t end) { kernels.prepare_tiles(weight, input, tiles, begin, end); });
    // Each panel goes through all activations, so threads take whole ones where there are enough to be shared fairly,
    // and otherwise pairs of row blocks, which the kernels multiply together.
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t step = weight.row_blocks >= 4 * threads * cpu::kPanelBlocks ? cpu::kPanelBlocks : 2;
    parallel_for(0, (weight.row_blocks + step - 1) / step, grain(weight.in_features * kLanes * input.rows * step),
                 [&](int64_t begin, int64_t end) {
                     kernels.multiply_tiles(weight, tiles, output, begin * step,
                                            std::min(end * step, weight.row_blocks));
                 });
}

// Many rows, some at a time: equal parts, each a multiple of two tiles but for the last.
void multiply_many(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output,
                   cpu::Mode mode) {
    const int64_t parts = (input.rows + kRowsAtATime - 1) / kRowsAtATime;
    const int64_t step = ((input.rows + parts - 1) / parts + 31) / 32 * 32;
    for (int64_t row = 0; row < input.rows; row += step) {
        const auto [rows, results] = part(weight, input, output, row, std::min(row + step, input.rows));
        multiply_tiles(weight, rows, results, mode);
    }
}

void dequantize_into(const PackedWeight& weight, const Tensor& dense, int64_t first_block, int64_t last_block) {
    const cpu::Kernels& kernels = cpu::kernels();
    const Float dtype = float_of(dense.scalar_type());
    char* data = static_cast<char*>(dense.data_ptr());
    const int64_t block_bytes = kLanes * weight.in_features * static_cast<int64_t>(dense.element_size());
    parallel_for(first_block, last_block, grain(kLanes * weight.in_features * 8), [&](int64_t begin, int64_t end) {
        kernels.dequantize(weight, data + (begin - first_block) * block_bytes, dtype, begin, end);
    });
}

}  // namespace

void multiply(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output, cpu::Mode mode) {
    if (input.rows == 0) return;
    if (input.rows <= cpu::kernels().few_rows) {
        multiply_few(weight, input, output);
    } else {
        multiply_many(weight, input, output, mode);
    }
}

namespace {

Tensor linear(const Tensor& input_, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
              const std::optional<Tensor>& bias_, int64_t bits, int64_t out_features, const std::string& mode_name) {
    check_linear(input_, bias_, out_features, mode_name);
    STD_TORCH_CHECK(input_.is_cpu(), "autoq::linear: input must be on the CPU, as the weight is; move it there");
    const cpu::Mode mode = mode_name == "exact" ? cpu::Mode::kExact : cpu::Mode::kInt8;
    const ScalarType dtype = input_.scalar_type();
    const int64_t in_features = input_.size(input_.dim() - 1);
    const PackedTensors packed(codes, scales, zeros, bits, out_features, in_features);
    packed.check_on_cpu();

    const Tensor input = make_contiguous(input_);
    std::optional<Tensor> bias;
    if (bias_) bias = make_contiguous(*bias_);
    std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
    shape.back() = out_features;
    Tensor out = torch::stable::new_empty(input, shape);
    const int64_t rows = input.numel() / in_features;
    multiply(packed.weight, {input.data_ptr(), float_of(dtype), rows},
             {out.data_ptr(), float_of(dtype), out_features, bias ? bias->data_ptr() : nullptr}, mode);
    return out;
}

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
