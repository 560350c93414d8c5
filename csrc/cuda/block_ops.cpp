// The steps of the operator `decoder_blocks`, and of those around it, on CUDA: the kernels, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../block_device.h"
#include "block.h"
#include "ops.h"
#include "stream.h"

namespace autoq {
namespace {

// From so many tokens on torch's attention, which multiplies with tensor cores, is faster than ours.
constexpr int64_t kManyTokens = 17;

class CudaDevice : public BlockDevice {
  public:
    // The device of this tensor.
    explicit CudaDevice(const Tensor& like)
        : index_(like.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

    const char* name() const override { return "the GPU of the activations"; }
    bool holds(const Tensor& tensor) const override { return tensor.is_cuda() && tensor.get_device_index() == index_; }

    Values linear(const Values& input, const Projection& projection, Workspace&) const override {
        const PackedTensors& packed = projection.packed;
        return values_of(linear_cuda(input->tensor, packed.codes, packed.scales, packed.zeros, projection.bias,
                                     packed.weight.bits, packed.weight.out_features, has_launched_));
    }

    void norm(const Norm& norm, const Buffer& input, const Buffer& output) const override {
        check_launch(cuda::norm(norm, input.data, nullptr, nullptr, output.data, input.dtype, input.rows, input.columns,
                                stream_));
    }

    void add(const Buffer& first, const Buffer* second, const Buffer& last) const override {
        check_launch(cuda::add(first.data, last.data, second ? second->data : nullptr, last.data, last.dtype,
                               last.rows * last.columns, stream_));
    }

    void add_and_norm(const Norm& norm, const Buffer& first, const Buffer& last, const Buffer& output) const override {
        check_launch(cuda::norm(norm, first.data, last.data, last.data, output.data, last.dtype, last.rows,
                                last.columns, stream_));
    }

    void activate(ActivationKind kind, bool gated, const Buffer& input, const void* scales,
                  const Buffer& output) const override {
        check_launch(cuda::activate(kind, gated, input.data, scales, output.data, output.dtype, output.rows,
                                    output.columns, stream_));
    }

    void rotary_tables(const RotaryTables& tables) const override {
        check_launch(cuda::rotary_tables(tables, stream_));
    }

    // Reading the length here would wait for the GPU, and a graph would not read it again.
    int64_t held(const std::optional<Tensor>&, int64_t past) const override { return past; }

    bool attends(const AttentionInput& input, bool) const override {
        return input.tokens < kManyTokens || input.length;
    }

    void attend(AttentionInput& input, const Buffer& output) const override {
        int splits = 0;
        check_launch(cuda::attention_splits(input, splits));
        const int64_t floats = cuda::attention_scratch(input, splits);
        const Tensor scratch = torch::stable::new_empty(output.tensor, {floats}, ScalarType::Float);
        input.output = output.data;
        check_launch(cuda::attend(input, splits, static_cast<float*>(scratch.data_ptr()), stream_));
    }

    Tensor rotate(AttentionInput& input, const Tensor& qkv) const override {
        const Tensor queries =
            torch::stable::new_empty(qkv, {input.batch, input.tokens, input.layout.heads, input.layout.head_dim});
        check_launch(cuda::rotate(input, queries.data_ptr(), stream_));
        return queries;
    }

    void widen(const CacheView& cache, int64_t positions, const Tensor& dense) const override {
        check_launch(cuda::widen(cache, dense.data_ptr(), float_of(dense.scalar_type()), dense.size(0) * dense.size(1),
                                 positions, dense.size(3), stream_));
    }

    Tensor score_terms(const AttentionInput& input, const Tensor& like) const override {
        const Tensor terms =
            torch::stable::new_empty(like, {input.batch, input.layout.heads, input.tokens, input.past + input.tokens});
        check_launch(cuda::score_terms(input, terms.data_ptr(), stream_));
        return terms;
    }

  private:
    void check_launch(const char* error) const {
        STD_TORCH_CHECK(error == nullptr,
                        "autoq: a CUDA kernel of decoder blocks, or of what is around them, was not launched: ", error);
        has_launched_ = true;
    }

    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_;
    // From the first kernel of a step on, none of which writes a weight, linears may overlap with the one before.
    mutable bool has_launched_ = false;
};

Tensor decoder_blocks_cuda(const Tensor& hidden, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                           const std::vector<Tensor>& key_scales, const std::vector<Tensor>& value_scales, int64_t past,
                           const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                           const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
                           const std::vector<double>& constants, const std::optional<Tensor>& length) {
    STD_TORCH_CHECK(hidden.is_cuda(), "autoq::decoder_blocks: hidden states, caches and tensors must be on one GPU");
    const CudaDevice device(hidden);
    DecoderBlocks blocks(device, hidden, {keys, values, key_scales, value_scales, past, tensors, settings, constants});
    return blocks.run(device, {hidden, cosines, sines, mask, bias, length});
}

Tensor norm_cuda(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 int64_t kind, double epsilon) {
    STD_TORCH_CHECK(input.is_cuda(), "autoq::norm: the input must be on the GPU, as the weight is; move it there");
    return norm(CudaDevice(input), input, weight, bias, kind, epsilon);
}

std::tuple<Tensor, Tensor> rotary_tables_cuda(const Tensor& positions, const Tensor& frequencies, double scale,
                                              ScalarType dtype) {
    STD_TORCH_CHECK(positions.is_cuda(), "autoq::rotary_tables: positions must be on the GPU, as the frequencies are");
    return rotary_tables(CudaDevice(positions), positions, frequencies, scale, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CUDA, m) {
    m.impl("decoder_blocks", TORCH_BOX(&decoder_blocks_cuda));
    m.impl("norm", TORCH_BOX(&norm_cuda));
    m.impl("rotary_tables", TORCH_BOX(&rotary_tables_cuda));
}

}  // namespace autoq
