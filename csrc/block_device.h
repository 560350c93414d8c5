// What decoder blocks (block.cpp) and the operators around them (model_ops.cpp) ask of a device: the steps between
// their checks and their tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block.h"
#include "packed.h"

namespace autoq {

// Activations [..., columns], contiguous, with what the kernels ask of them: torch is asked once.
struct Buffer {
    Tensor tensor;
    void* data;
    int64_t rows, columns;
    Float dtype;

    explicit Buffer(Tensor tensor_)
        : tensor(std::move(tensor_)),
          data(tensor.data_ptr()),
          rows(1),
          columns(tensor.size(tensor.dim() - 1)),
          dtype(float_of(tensor.scalar_type())) {
        for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
    }
};

using Values = std::shared_ptr<const Buffer>;

inline Values values_of(Tensor tensor) { return std::make_shared<const Buffer>(std::move(tensor)); }

// Memory for the activations of blocks with as many tokens: what nobody holds any more is used again.
class Workspace {
  public:
    Values empty(const Tensor& like, int64_t columns) {
        for (const Values& values : buffers_) {
            if (values.use_count() == 1 && values->columns == columns) return values;
        }
        buffers_.push_back(values_of(torch::stable::new_empty(like, {like.size(0), like.size(1), columns})));
        return buffers_.back();
    }

    // The tensor of these values, which is the caller's from now on.
    Tensor give(const Values& values) {
        std::erase(buffers_, values);
        return values->tensor;
    }

  private:
    std::vector<Values> buffers_;
};

// A quantized linear, checked.
struct Projection {
    PackedTensors packed;
    std::optional<Tensor> bias;
    bool int8;  // the mode of many rows
};

// One for each call. All tensors are contiguous, on the device, and of the shapes that were checked.
class BlockDevice {
  public:
    virtual ~BlockDevice() = default;

    virtual const char* name() const = 0;  // in sentences: "the CPU"
    virtual bool holds(const Tensor& tensor) const = 0;

    // autoq::linear.
    virtual Values linear(const Values& input, const Projection& projection, Workspace& workspace) const = 0;

    // output = norm(input), over the last dimension.
    virtual void norm(const Norm& norm, const Buffer& input, const Buffer& output) const = 0;
    // last = first + second (where given) + last.
    virtual void add(const Buffer& first, const Buffer* second, const Buffer& last) const = 0;
    // last = first + last, rounded; output = norm(last).
    virtual void add_and_norm(const Norm& norm, const Buffer& first, const Buffer& last, const Buffer& output) const {
        add(first, nullptr, last);
        this->norm(norm, last, output);
    }
    // output[r, c] = act(input[r, c]) (* input[r, columns + c] where gated) (/ scales[c]).
    virtual void activate(ActivationKind kind, bool gated, const Buffer& input, const void* scales,
                          const Buffer& output) const = 0;

    virtual void rotary_tables(const RotaryTables& tables) const = 0;

    // How many positions the caches hold, for sizes on the host: `past`, unless the device reads `length` here.
    virtual int64_t held(const std::optional<Tensor>& length, int64_t past) const = 0;

    // Whether `attend` does this attention, rather than torch's with `rotate`, `widen` and `score_terms`. `torch_knows`
    // is whether torch needs no terms but the mask that is given, or causality.
    virtual bool attends(const AttentionInput& input, bool torch_knows) const = 0;

    // Heads turned, keys and values written, attention into `output` [batch, tokens, heads * head_dim].
    virtual void attend(AttentionInput& input, const Buffer& output) const = 0;

    // Heads turned, keys and values written; the queries, scaled, [batch, tokens, heads, head_dim] in their dtype.
    virtual Tensor rotate(AttentionInput& input, const Tensor& qkv) const = 0;

    // The first `positions` of a cache of bytes, written to a dense one.
    virtual void widen(const CacheView& cache, int64_t positions, const Tensor& dense) const = 0;

    // All that is added to the scores, [batch, heads, tokens, positions]; asked for where torch does not know it.
    virtual Tensor score_terms(const AttentionInput& input, const Tensor& like) const = 0;
};

// The arguments of the operator `decoder_blocks`, described in autoq/block_ops.py: those that are the same for every
// token, and the others.
struct BlocksArguments {
    std::vector<Tensor> keys, values, key_scales, value_scales;
    int64_t past;
    std::vector<Tensor> tensors;
    std::vector<int64_t> settings;
    std::vector<double> constants;
};

struct StepArguments {
    const Tensor& hidden;
    const std::optional<Tensor>& cosines;
    const std::optional<Tensor>& sines;
    const std::optional<Tensor>& mask;
    const std::optional<Tensor>& bias;
    const std::optional<Tensor>& length;
};

struct Block;

// Decoder blocks with their caches, checked, and memory for their activations: what is kept from one step to the next,
// where steps are recorded. One thread may run them at a time.
class DecoderBlocks {
  public:
    // hidden: those of the first step; the shapes and dtypes of the others are the same.
    DecoderBlocks(const BlockDevice& device, const Tensor& hidden, const BlocksArguments& arguments);
    ~DecoderBlocks();

    int64_t tokens() const { return shape_[1]; }

    // The operator.
    Tensor run(const BlockDevice& device, const StepArguments& step);

  private:
    std::vector<Block> blocks_;
    std::vector<int64_t> shape_;  // of the hidden states
    ScalarType dtype_;
    int64_t past_;
    Workspace workspace_;
};

// The operators `norm` and `rotary_tables`, described in autoq/model_ops.py.
Tensor norm(const BlockDevice& device, const Tensor& input, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, int64_t kind, double epsilon);
std::tuple<Tensor, Tensor> rotary_tables(const BlockDevice& device, const Tensor& positions, const Tensor& frequencies,
                                         double scale, ScalarType dtype);

}  // namespace autoq
