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

// The arguments that both operators have in common; `pulls` and `codes` are written. `factors` must be contiguous.
cpu::Channels channels_of(const char* name, const Tensor& pulls, const Tensor& codes, const Tensor& scales,
                          const Tensor& zeros, const Tensor& factors, int64_t bits) {
    const auto fits = [&](const Tensor& tensor, int64_t rows) {
        return tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
               tensor.is_contiguous() && tensor.size(0) == rows && tensor.size(1) == pulls.size(1);
    };
    STD_TORCH_CHECK(pulls.dim() == 2 && scales.dim() == 2, "autoq::", name,
                    ": what is given of each channel must have two dimensions, channels and outputs");
    const int64_t channels = pulls.size(0), groups = scales.size(0);
    STD_TORCH_CHECK(fits(pulls, channels) && fits(codes, channels), "autoq::", name,
                    ": what is given of each channel must be contiguous float32 on the CPU, of one shape");
    STD_TORCH_CHECK(fits(scales, groups) && fits(zeros, groups) && groups > 0 && channels % groups == 0,
                    "autoq::", name, ": scales and zeros must be contiguous float32 on the CPU, [groups, ",
                    pulls.size(1), "], of groups that divide ", channels, " channels");
    STD_TORCH_CHECK(factors.is_cpu() && factors.scalar_type() == ScalarType::Float && factors.dim() == 2 &&
                        factors.size(0) == channels && factors.size(1) == channels,
                    "autoq::", name, ": factors must be float32 [", channels, ", ", channels, "] on the CPU");
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "autoq::", name, ": bits is ", bits, "; it must be 2 to 8");
    return {nullptr,
            static_cast<float*>(pulls.data_ptr()),
            static_cast<float*>(codes.data_ptr()),
            static_cast<const float*>(scales.data_ptr()),
            static_cast<const float*>(zeros.data_ptr()),
            static_cast<const float*>(factors.data_ptr()),
            channels,
            pulls.size(1),
            channels / groups,
            static_cast<int>(bits)};
}

void for_outputs(const cpu::Channels& work, void (*kernel)(const cpu::Channels&, int64_t, int64_t)) {
    const int64_t strips = (work.outputs + kLanes - 1) / kLanes;
    torch::stable::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
        kernel(work, begin * kLanes, std::min(end * kLanes, work.outputs));
    });
}

void compensate_channels(Tensor values, Tensor pulls, Tensor codes, const Tensor& scales, const Tensor& zeros,
                         const Tensor& factors_, int64_t bits) {
    const Tensor factors = make_contiguous(factors_);
    cpu::Channels work = channels_of("compensate_channels", pulls, codes, scales, zeros, factors, bits);
    STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.dim() == 2 &&
                        values.is_contiguous() && values.size(0) == work.channels && values.size(1) == work.outputs,
                    "autoq::compensate_channels: values must be contiguous float32 on the CPU, shaped as the codes");
    work.values = static_cast<float*>(values.data_ptr());
    for_outputs(work, cpu::kernels().search->compensate);
}

void descend_channels(Tensor gradient, Tensor codes, const Tensor& scales, const Tensor& zeros, const Tensor& gram_,
                      int64_t bits) {
    const Tensor gram = make_contiguous(gram_);
    for_outputs(channels_of("descend_channels", gradient, codes, scales, zeros, gram, bits),
                cpu::kernels().search->descend);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("group_errors", TORCH_BOX(&group_errors));
    m.impl("compensate_channels", TORCH_BOX(&compensate_channels));
    m.impl("descend_channels", TORCH_BOX(&descend_channels));
}

}  // namespace autoq
