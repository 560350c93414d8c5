// What the search and the rounding ask of the CPU. Schemas and references are in autoq/quantization/search_ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "packed.h"

namespace autoq {
namespace {

// Rows of a group that a thread takes at a time: their weights stay in its cache beside the group's Gram matrix.
constexpr int64_t kRowsAtATime = 96;

void check_floats(const Tensor& tensor, int64_t dimensions, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == dimensions && tensor.scalar_type() == ScalarType::Float,
                    "autoq::group_errors: ", name, " must be float32 of ", dimensions, " dimensions on the CPU");
}

Tensor group_errors(const Tensor& weights_, const Tensor& low_, const Tensor& high_, const Tensor& gram_, int64_t bits,
                    bool zero_point) {
    check_floats(weights_, 3, "weights");
    check_floats(low_, 2, "low");
    check_floats(high_, 2, "high");
    check_floats(gram_, 3, "gram");
    const Tensor weights = make_contiguous(weights_), low = make_contiguous(low_), high = make_contiguous(high_),
                 gram = make_contiguous(gram_);
    const int64_t rows = weights.size(0), groups = weights.size(1), size = weights.size(2);
    const auto is_of_groups = [&](const Tensor& ends) { return ends.size(0) == rows && ends.size(1) == groups; };
    STD_TORCH_CHECK(is_of_groups(low) && is_of_groups(high), "autoq::group_errors: low and high must have the shape [",
                    rows, ", ", groups, "], as many rows and groups as the weights");
    STD_TORCH_CHECK(gram.size(0) == groups && gram.size(1) == size && gram.size(2) == size,
                    "autoq::group_errors: gram must have the shape [", groups, ", ", size, ", ", size, "]");
    STD_TORCH_CHECK(size > 0 && size % kLanes == 0, "autoq::group_errors: groups of ", size,
                    " weights; they must be a multiple of 16");
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "autoq::group_errors: bits is ", bits, "; it must be 2 to 8");
    Tensor errors = torch::stable::new_empty(weights, {rows, groups});
    const cpu::GroupErrors work{static_cast<const float*>(weights.data_ptr()),
                                static_cast<const float*>(low.data_ptr()),
                                static_cast<const float*>(high.data_ptr()),
                                static_cast<const float*>(gram.data_ptr()),
                                static_cast<float*>(errors.data_ptr()),
                                rows,
                                groups,
                                size,
                                static_cast<int>(bits),
                                zero_point};
    const cpu::SearchKernels& kernels = *cpu::kernels().search;
    const int64_t parts = (rows + kRowsAtATime - 1) / kRowsAtATime;
    torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t first = item % parts * kRowsAtATime;
            kernels.group_errors(work, item / parts, first, std::min(first + kRowsAtATime, rows));
        }
    });
    return errors;
}

// ---- channels, one after the other ----------------------------------------------------------------------------------

void check_channels(const char* name, const char* argument, const Tensor& tensor, int64_t rows, int64_t outputs) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                        tensor.is_contiguous() && tensor.size(0) == rows && tensor.size(1) == outputs,
                    "autoq::", name, ": ", argument, " must be contiguous float32 [", rows, ", ", outputs,
                    "] on the CPU");
}

// The arguments that both operators have in common. `factors` must be contiguous.
cpu::Channels channels_of(const char* name, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                          const Tensor& factors, int64_t bits) {
    STD_TORCH_CHECK(codes.dim() == 2, "autoq::", name, ": codes must have two dimensions, channels and outputs");
    STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) > 0 && codes.size(0) % scales.size(0) == 0, "autoq::", name,
                    ": scales must have two dimensions, outputs and groups that divide ", codes.size(0), " channels");
    const int64_t channels = codes.size(0), outputs = codes.size(1), groups = scales.size(0);
    check_channels(name, "codes", codes, channels, outputs);
    check_channels(name, "scales", scales, groups, outputs);
    check_channels(name, "zeros", zeros, groups, outputs);
    check_channels(name, "factors", factors, channels, channels);
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "autoq::", name, ": bits is ", bits, "; it must be 2 to 8");
    cpu::Channels work{};
    work.codes = static_cast<float*>(codes.data_ptr());
    work.scales = static_cast<const float*>(scales.data_ptr());
    work.zeros = static_cast<const float*>(zeros.data_ptr());
    work.factors = static_cast<const float*>(factors.data_ptr());
    work.channels = channels;
    work.outputs = outputs;
    work.group_size = channels / groups;
    work.bits = static_cast<int>(bits);
    return work;
}

void for_outputs(const cpu::Channels& work, void (*kernel)(const cpu::Channels&, int64_t, int64_t)) {
    const int64_t strips = (work.outputs + kLanes - 1) / kLanes;
    torch::stable::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
        kernel(work, begin * kLanes, std::min(end * kLanes, work.outputs));
    });
}

void compensate_channels(Tensor values, Tensor pulls, Tensor codes, const Tensor& scales, const Tensor& zeros,
                         const Tensor& factors_, int64_t bits) {
    const char* name = "compensate_channels";
    const Tensor factors = make_contiguous(factors_);
    cpu::Channels work = channels_of(name, codes, scales, zeros, factors, bits);
    check_channels(name, "values", values, work.channels, work.outputs);
    check_channels(name, "pulls", pulls, work.channels, work.outputs);
    work.values = static_cast<float*>(values.data_ptr());
    work.pulls = static_cast<float*>(pulls.data_ptr());
    for_outputs(work, cpu::kernels().search->compensate);
}

void descend_channels(Tensor gradient, Tensor codes, const Tensor& scales, const Tensor& zeros, const Tensor& gram_,
                      int64_t bits) {
    const char* name = "descend_channels";
    const Tensor gram = make_contiguous(gram_);
    cpu::Channels work = channels_of(name, codes, scales, zeros, gram, bits);
    check_channels(name, "gradient", gradient, work.channels, work.outputs);
    work.gradient = static_cast<float*>(gradient.data_ptr());
    for_outputs(work, cpu::kernels().search->descend);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("group_errors", TORCH_BOX(&group_errors));
    m.impl("compensate_channels", TORCH_BOX(&compensate_channels));
    m.impl("descend_channels", TORCH_BOX(&descend_channels));
}

}  // namespace autoq
