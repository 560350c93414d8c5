// The steps of the operator `decoder_blocks` on the CPU: the kernels in use, spread over the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "block_device.h"
#include "cpu/kernels.h"
#include "ops.h"
#include "team.h"

namespace autoq {
namespace {

// The kernels in use.
const cpu::BlockKernels& block_kernels() { return *cpu::kernels().block; }

// From so many tokens on torch's attention, which multiplies with matrix units, is faster than ours.
constexpr int64_t kManyTokens = 16;

// Below this many elements a thread is not worth waking.
constexpr int64_t kElementsPerThread = 1 << 14;

int64_t rows_per_thread(int64_t columns) { return std::max<int64_t>(1, kElementsPerThread / columns); }

// Turns the heads of all tokens; the queries go into scratch, which is returned.
Tensor rotate_all(AttentionInput& input, const Tensor& like) {
    Tensor queries = torch::stable::new_empty(
        like, {input.batch, input.tokens, input.layout.heads, input.padded_head_dim()}, ScalarType::Float);
    input.queries = static_cast<float*>(queries.data_ptr());
    parallel_for(0, input.batch * input.tokens, rows_per_thread(input.layout.row_size()),
                 [&](int64_t begin, int64_t end) { block_kernels().rotate(input, begin, end); });
    return queries;
}

void attend_directly(const AttentionInput& input) {
    const int64_t shared = input.layout.heads / input.layout.kv_heads;  // query heads of a key head
    int64_t heads_per_item = shared, tokens_per_item = 1;
    if (input.tokens == 1) {
        // All query heads of a key head in one pass over the keys, unless that leaves threads without work.
        const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
        const int64_t fair = std::max<int64_t>(1, input.batch * input.layout.heads / threads);
        heads_per_item = std::min(shared, fair);
    } else {
        tokens_per_item = std::max<int64_t>(1, 16 / shared);
    }
    const int64_t chunks = (shared + heads_per_item - 1) / heads_per_item;
    const int64_t spans = (input.tokens + tokens_per_item - 1) / tokens_per_item;
    const int64_t items = input.batch * input.layout.kv_heads * chunks * spans;
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t span = item % spans, chunk = item / spans % chunks;
            const int64_t group = item / spans / chunks % input.layout.kv_heads;
            const int64_t batch = item / spans / chunks / input.layout.kv_heads;
            const int64_t first = chunk * heads_per_item;
            const int64_t token = span * tokens_per_item;
            block_kernels().attend(input, batch, group * shared + first, std::min(heads_per_item, shared - first),
                                   token, std::min(tokens_per_item, input.tokens - token));
        }
    });
}

class CpuDevice : public BlockDevice {
  public:
    const char* name() const override { return "the CPU"; }
    bool holds(const Tensor& tensor) const override { return tensor.is_cpu(); }

    Tensor linear(const Tensor& input, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                  const std::optional<Tensor>& bias, int64_t bits, int64_t out_features,
                  const std::string& mode) const override {
        return autoq::linear(input, codes, scales, zeros, bias, bits, out_features, mode);
    }

    void norm(const Norm& norm, const Tensor& input, const Tensor& output) const override {
        const int64_t columns = input.size(input.dim() - 1), rows = input.numel() / columns;
        const Float dtype = float_of(input.scalar_type());
        parallel_for(0, rows, rows_per_thread(columns), [&](int64_t begin, int64_t end) {
            block_kernels().norm(norm, input.data_ptr(), output.data_ptr(), dtype, columns, begin, end);
        });
    }

    void add(const Tensor& first, const Tensor* second, const Tensor& last) const override {
        const Float dtype = float_of(last.scalar_type());
        parallel_for(0, last.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
            block_kernels().add(first.data_ptr(), last.data_ptr(), second ? second->data_ptr() : nullptr,
                                last.data_ptr(), dtype, begin, end);
        });
    }

    void activate(ActivationKind kind, bool gated, const Tensor& input, const void* scales,
                  const Tensor& output) const override {
        const int64_t columns = output.size(output.dim() - 1), rows = output.numel() / columns;
        const Float dtype = float_of(input.scalar_type());
        parallel_for(0, rows, rows_per_thread(columns), [&](int64_t begin, int64_t end) {
            block_kernels().activate(kind, gated, input.data_ptr(), scales, output.data_ptr(), dtype, columns, begin,
                                     end);
        });
    }

    int64_t held(const std::optional<Tensor>& length, int64_t past) const override {
        if (!length) return past;
        const int64_t found = *static_cast<const int64_t*>(length->data_ptr());
        STD_TORCH_CHECK(found >= 0 && found <= past, "autoq::decoder_blocks: the length is ", found,
                        " but must be between 0 and ", past, ", the past it stands for at most");
        return found;
    }

    bool attends(const AttentionInput& input, bool torch_knows) const override {
        return input.tokens < kManyTokens || !torch_knows;
    }

    void attend(AttentionInput& input, const Tensor& output) const override {
        const Tensor queries = rotate_all(input, output);
        input.output = output.data_ptr();
        attend_directly(input);
    }

    Tensor rotate(AttentionInput& input, const Tensor& qkv) const override {
        Tensor queries = rotate_all(input, qkv);
        return torch::stable::to(torch::stable::narrow(queries, 3, 0, input.layout.head_dim), qkv.scalar_type());
    }

    void widen(const CacheView& cache, int64_t positions, const Tensor& dense) const override {
        const Float dtype = float_of(dense.scalar_type());
        parallel_for(0, dense.size(0) * dense.size(1), 1, [&](int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) {
                block_kernels().widen(cache, dense.data_ptr(), dtype, dense.size(3), head * cache.capacity,
                                      head * cache.capacity + positions);
            }
        });
    }

    Tensor score_terms(const AttentionInput&, const Tensor& like) const override {
        STD_TORCH_CHECK(false, "autoq::decoder_blocks: the CPU's own attention adds its terms itself");
        return like;
    }
};

Tensor decoder_blocks_cpu(const Tensor& hidden, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                          const std::vector<Tensor>& key_scales, const std::vector<Tensor>& value_scales, int64_t past,
                          const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                          const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                          const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
                          const std::vector<double>& constants, const std::optional<Tensor>& length) {
    const BlocksArguments given{hidden, keys, values, key_scales, value_scales, past,      cosines,
                                sines,  mask, bias,   tensors,    settings,     constants, length};
    // Where torch attends, its operators need the threads for themselves.
    if (hidden.dim() != 3 || hidden.size(1) >= kManyTokens) return decoder_blocks(CpuDevice(), given);
    std::optional<Tensor> output;
    Team::lead([&] { output = decoder_blocks(CpuDevice(), given); });
    return *output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) { m.impl("decoder_blocks", TORCH_BOX(&decoder_blocks_cpu)); }

}  // namespace autoq
