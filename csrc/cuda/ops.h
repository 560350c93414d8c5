// Operators on CUDA that other operators are made of.
#pragma once

#include <optional>
#include <string>

#include "../packed.h"

namespace autoq {

// autoq::linear, without check_linear. overlaps: see cuda::LinearProblem.
Tensor linear_cuda(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                   const std::optional<Tensor>& bias, int64_t bits, int64_t out_features, bool overlaps);

}  // namespace autoq
