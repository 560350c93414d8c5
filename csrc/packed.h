// From the operators' tensors to the plain structures that the kernels know, with every check on the way.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "layout.h"

namespace autoq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_supported_float(ScalarType dtype) {
    return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline Float float_of(ScalarType supported) {
    switch (supported) {
        case ScalarType::Float:
            return Float::kFloat32;
        case ScalarType::BFloat16:
            return Float::kBFloat16;
        default:
            return Float::kFloat16;
    }
}

inline Tensor make_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// What `linear` asks of its arguments beside the weight, on any device.
inline void check_linear(const Tensor& input, const std::optional<Tensor>& bias, int64_t out_features,
                         const std::string& mode) {
    STD_TORCH_CHECK(mode == "exact" || mode == "int8", "autoq::linear: the mode is '", mode,
                    "' but must be 'exact' or 'int8'");
    STD_TORCH_CHECK(input.dim() >= 1, "autoq::linear: input must have at least one dimension, the features");
    STD_TORCH_CHECK(is_supported_float(input.scalar_type()),
                    "autoq::linear: input must be float32, bfloat16 or float16; convert it to one of them");
    if (!bias) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "autoq::linear: bias must have the shape [",
                    out_features, "], one value for each output feature");
    STD_TORCH_CHECK(bias->scalar_type() == input.scalar_type(),
                    "autoq::linear: bias must have the dtype of the input; convert it");
    STD_TORCH_CHECK(bias->device() == input.device(),
                    "autoq::linear: bias must be on the device of the input; move it there");
}

// The three tensors of a packed weight, contiguous, and what they describe. Holds the tensors, so that the borrowed
// pointers of `weight` stay valid.
struct PackedTensors {
    Tensor codes, scales, zeros;
    PackedWeight weight;

    PackedTensors(const Tensor& codes_, const Tensor& scales_, const Tensor& zeros_, int64_t bits, int64_t out_features,
                  int64_t in_features)
        : codes(make_contiguous(codes_)), scales(make_contiguous(scales_)), zeros(make_contiguous(zeros_)) {
        check_sizes(bits, out_features, in_features);
        const int64_t row_blocks = (out_features + kLanes - 1) / kLanes;
        const int64_t units = (in_features + kUnitColumns - 1) / kUnitColumns;
        check_codes(bits, row_blocks, units);
        check_parameters(scales, "scales", ScalarType::Half, "float16", row_blocks);
        check_parameters(zeros, "zeros", ScalarType::Byte, "uint8", row_blocks);
        const int64_t groups = scales.size(1);
        STD_TORCH_CHECK(zeros.size(1) == groups, "autoq: zeros have ", zeros.size(1), " groups but scales have ",
                        groups, "; both must have the same number");
        STD_TORCH_CHECK(groups == 1 || (groups > 0 && in_features % groups == 0 && in_features / groups % 16 == 0),
                        "autoq: ", groups, " groups do not cut ", in_features,
                        " input features into groups of a multiple of 16");
        weight = PackedWeight{static_cast<const uint32_t*>(codes.data_ptr()),
                              static_cast<const uint16_t*>(scales.data_ptr()),
                              static_cast<const uint8_t*>(zeros.data_ptr()),
                              static_cast<int>(bits),
                              out_features,
                              in_features,
                              row_blocks,
                              units,
                              groups,
                              in_features / groups};
    }

    // A part of the rows, in whole blocks.
    PackedWeight blocks(int64_t first, int64_t count) const {
        PackedWeight part = weight;
        part.codes = weight.unit(first, 0);
        part.scales += first * weight.groups * kLanes;
        part.zeros += first * weight.groups * kLanes;
        part.row_blocks = count;
        part.out_features = std::min(weight.out_features - first * kLanes, count * kLanes);
        return part;
    }

    // Whether one of the tensors is not the one that was given.
    bool copies(const Tensor& codes_, const Tensor& scales_, const Tensor& zeros_) const {
        return codes.data_ptr() != codes_.data_ptr() || scales.data_ptr() != scales_.data_ptr() ||
               zeros.data_ptr() != zeros_.data_ptr();
    }

    void check_on_cpu() const {
        STD_TORCH_CHECK(codes.is_cpu() && scales.is_cpu() && zeros.is_cpu(),
                        "autoq: codes, scales and zeros must all be on the CPU, as the input is; move them there");
    }

  private:
    static void check_sizes(int64_t bits, int64_t out_features, int64_t in_features) {
        STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "autoq: bits is ", bits,
                        "; it must be 2, 3, 4 or 8");
        STD_TORCH_CHECK(out_features > 0 && in_features > 0, "autoq: a weight of shape [", out_features, ", ",
                        in_features, "] is empty; both sizes must be positive");
    }

    void check_codes(int64_t bits, int64_t row_blocks, int64_t units) const {
        STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int, "autoq: codes must be int32 words; pack the weight");
        STD_TORCH_CHECK(codes.dim() == 4 && codes.size(0) == row_blocks && codes.size(1) == units &&
                            codes.size(2) == bits && codes.size(3) == kLanes,
                        "autoq: codes must have the shape [", row_blocks, ", ", units, ", ", bits,
                        ", 16] for these features and bits; pack the weight for them");
    }

    static void check_parameters(const Tensor& tensor, const char* name, ScalarType dtype, const char* dtype_name,
                                 int64_t row_blocks) {
        STD_TORCH_CHECK(tensor.scalar_type() == dtype, "autoq: ", name, " must be ", dtype_name, "; pack the weight");
        STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == row_blocks && tensor.size(2) == kLanes, "autoq: ", name,
                        " must have the shape [", row_blocks, ", groups, 16] for these features; pack the weight");
    }
};

}  // namespace autoq
