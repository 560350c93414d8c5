// What the operator `decoder_blocks` (block.cpp) asks of a device: the steps between its checks and its tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "packed.h"

namespace autoq {

// One for each call of the operator. All tensors are contiguous, on the device, and of the shapes the operator checked.
class BlockDevice {
  public:
    virtual ~BlockDevice() = default;

    virtual const char* name() const = 0;  // in sentences: "the CPU"
    virtual bool holds(const Tensor& tensor) const = 0;

    // autoq::linear.
    virtual Tensor linear(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                          const std::optional<Tensor>& bias, int64_t bits, int64_t out_features,
                          const std::string& mode) const = 0;

    // output = norm(input), over the last dimension.
    virtual void norm(const Norm& norm, const Tensor& input, const Tensor& output) const = 0;
    // last = first + second (where given) + last.
    virtual void add(const Tensor& first, const Tensor* second, const Tensor& last) const = 0;
    // last = first + last, rounded; output = norm(last).
    virtual void add_and_norm(const Norm& norm, const Tensor& first, const Tensor& last, const Tensor& output) const {
        add(first, nullptr, last);
        this->norm(norm, last, output);
    }
    // output[r, c] = act(input[r, c]) (* input[r, columns + c] where gated) (/ scales[c]).
    virtual void activate(ActivationKind kind, bool gated, const Tensor& input, const void* scales,
                          const Tensor& output) const = 0;

    // How many positions the caches hold, for sizes on the host: `past`, unless the device reads `length` here.
    virtual int64_t held(const std::optional<Tensor>& length, int64_t past) const = 0;

    // Whether `attend` does this attention, rather than torch's with `rotate`, `widen` and `score_terms`. `torch_knows`
    // is whether torch needs no terms but the mask that is given, or causality.
    virtual bool attends(const AttentionInput& input, bool torch_knows) const = 0;

    // Heads turned, keys and values written, attention into `output` [batch, tokens, heads * head_dim].
    virtual void attend(AttentionInput& input, const Tensor& output) const = 0;

    // Heads turned, keys and values written; the queries, scaled, [batch, tokens, heads, head_dim] in their dtype.
    virtual Tensor rotate(AttentionInput& input, const Tensor& qkv) const = 0;

    // The first `positions` of a cache of bytes, written to a dense one.
    virtual void widen(const CacheView& cache, int64_t positions, const Tensor& dense) const = 0;

    // All that is added to the scores, [batch, heads, tokens, positions]; asked for where torch does not know it.
    virtual Tensor score_terms(const AttentionInput& input, const Tensor& like) const = 0;
};

// The operator; its arguments are described in autoq/block_ops.py.
struct BlocksArguments {
    const Tensor& hidden;
    const std::vector<Tensor>& keys;
    const std::vector<Tensor>& values;
    const std::vector<Tensor>& key_scales;
    const std::vector<Tensor>& value_scales;
    int64_t past;
    const std::optional<Tensor>& cosines;
    const std::optional<Tensor>& sines;
    const std::optional<Tensor>& mask;
    const std::optional<Tensor>& bias;
    const std::vector<Tensor>& tensors;
    const std::vector<int64_t>& settings;
    const std::vector<double>& constants;
    const std::optional<Tensor>& length;
};

Tensor decoder_blocks(const BlockDevice& device, const BlocksArguments& arguments);

}  // namespace autoq
