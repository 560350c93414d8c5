// The steps of the operator `decoder_blocks`, and of those around it, on the CPU: the kernels in use, spread over the
// threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "block_device.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "kept.h"
#include "ops.h"
#include "team.h"

namespace autoq {
namespace {

// The kernels in use.
const cpu::BlockKernels& block_kernels() { return *cpu::kernels().block; }

// From so many tokens on torch's attention, where that multiplies with matrix units, is faster than ours.
constexpr int64_t kManyTokens = 16;

// Queries of several tokens that a thread takes at once: they share what is made of the keys.
constexpr int64_t kQueriesPerItem = 64;
constexpr int64_t kLeastQueriesPerItem = 16;

// Queries that a thread keeps memory for, so that a token needs none of torch's.
constexpr int64_t kScratchFloats = 1 << 18;

bool torch_attends(int64_t tokens) { return tokens >= kManyTokens && cpu::kernels().torch_attends; }

// Below this many elements a thread is not worth waking.
constexpr int64_t kElementsPerThread = 1 << 14;

int64_t rows_per_thread(int64_t columns) { return std::max<int64_t>(1, kElementsPerThread / columns); }

// Turns the heads of all tokens; the queries go to `queries`, [batch, tokens, heads, padded head_dim].
void rotate_all(AttentionInput& input, float* queries) {
    input.queries = queries;
    parallel_for(0, input.batch * input.tokens, rows_per_thread(input.layout.row_size()),
                 [&](int64_t begin, int64_t end) { block_kernels().rotate(input, begin, end); });
}

void attend_directly(const AttentionInput& input) {
    const int64_t shared = input.layout.heads / input.layout.kv_heads;  // query heads of a key head
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    int64_t heads_per_item = shared, tokens_per_item = 1;
    if (input.tokens == 1) {
        // All query heads of a key head in one pass over the keys, unless that leaves threads without work.
        const int64_t heads = input.batch * input.layout.heads;
        heads_per_item = std::min(shared, (heads + threads - 1) / threads);
    } else {
        const int64_t fair = input.batch * input.layout.heads * input.tokens / (4 * threads);
        const int64_t queries = std::clamp(fair, kLeastQueriesPerItem, kQueriesPerItem);
        tokens_per_item = std::max<int64_t>(1, queries / shared);
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

    Values linear(const Values& input, const Projection& projection, Workspace& workspace) const override {
        const PackedWeight& weight = projection.packed.weight;
        const Values output = workspace.empty(input->tensor, weight.out_features);
        multiply(
            weight, {input->data, input->dtype, input->rows},
            {output->data, output->dtype, output->columns, projection.bias ? projection.bias->data_ptr() : nullptr},
            projection.int8 ? cpu::Mode::kInt8 : cpu::Mode::kExact);
        return output;
    }

    void norm(const Norm& norm, const Buffer& input, const Buffer& output) const override {
        parallel_for(0, input.rows, rows_per_thread(input.columns), [&](int64_t begin, int64_t end) {
            block_kernels().norm(norm, input.data, output.data, input.dtype, input.columns, begin, end);
        });
    }

    void add(const Buffer& first, const Buffer* second, const Buffer& last) const override {
        parallel_for(0, last.rows * last.columns, kElementsPerThread, [&](int64_t begin, int64_t end) {
            block_kernels().add(first.data, last.data, second ? second->data : nullptr, last.data, last.dtype, begin,
                                end);
        });
    }

    void activate(ActivationKind kind, bool gated, const Buffer& input, const void* scales,
                  const Buffer& output) const override {
        parallel_for(0, output.rows, rows_per_thread(output.columns), [&](int64_t begin, int64_t end) {
            block_kernels().activate(kind, gated, input.data, scales, output.data, output.dtype, output.columns, begin,
                                     end);
        });
    }

    void rotary_tables(const RotaryTables& tables) const override {
        constexpr int64_t kElementsPerAngle = 32;  // a cosine and a sine take as long as so many elements
        parallel_for(0, tables.count, rows_per_thread(kElementsPerAngle * tables.angles),
                     [&](int64_t begin, int64_t end) { block_kernels().rotary_tables(tables, begin, end); });
    }

    int64_t held(const std::optional<Tensor>& length, int64_t past) const override {
        if (!length) return past;
        const int64_t found = *static_cast<const int64_t*>(length->data_ptr());
        STD_TORCH_CHECK(found >= 0 && found <= past, "autoq::decoder_blocks: the length is ", found,
                        " but must be between 0 and ", past, ", the past it stands for at most");
        return found;
    }

    bool attends(const AttentionInput& input, bool torch_knows) const override {
        return !torch_attends(input.tokens) || !torch_knows;
    }

    void attend(AttentionInput& input, const Buffer& output) const override {
        static thread_local cpu::Scratch scratch;
        const int64_t floats = input.batch * input.tokens * input.layout.heads * input.padded_head_dim();
        std::optional<Tensor> queries;
        if (floats > kScratchFloats) queries = torch::stable::new_empty(output.tensor, {floats}, ScalarType::Float);
        rotate_all(input, queries ? static_cast<float*>(queries->data_ptr())
                                  : reinterpret_cast<float*>(scratch.get(floats * sizeof(float))));
        input.output = output.data;
        attend_directly(input);
    }

    Tensor rotate(AttentionInput& input, const Tensor& qkv) const override {
        Tensor queries = torch::stable::new_empty(
            qkv, {input.batch, input.tokens, input.layout.heads, input.padded_head_dim()}, ScalarType::Float);
        rotate_all(input, static_cast<float*>(queries.data_ptr()));
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

Tensor run(DecoderBlocks& blocks, const StepArguments& step) {
    // Where torch attends, its operators need the threads for themselves.
    if (torch_attends(blocks.tokens())) return blocks.run(CpuDevice(), step);
    std::optional<Tensor> output;
    Team::lead([&] { output = blocks.run(CpuDevice(), step); });
    return *output;
}

Tensor decoder_blocks(const Tensor& hidden, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                      const std::vector<Tensor>& key_scales, const std::vector<Tensor>& value_scales, int64_t past,
                      const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                      const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                      const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
                      const std::vector<double>& constants, const std::optional<Tensor>& length) {
    DecoderBlocks blocks(CpuDevice(), hidden,
                         {keys, values, key_scales, value_scales, past, tensors, settings, constants});
    return run(blocks, {hidden, cosines, sines, mask, bias, length});
}

// ---- blocks that are kept ------------------------------------------------------------------------------------------

Kept<DecoderBlocks>& kept_blocks() {
    static Kept<DecoderBlocks> all;
    return all;
}

int64_t keep_decoder_blocks(const Tensor& hidden, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                            const std::vector<Tensor>& key_scales, const std::vector<Tensor>& value_scales,
                            int64_t past, const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
                            const std::vector<double>& constants) {
    return kept_blocks().add(std::make_shared<DecoderBlocks>(
        CpuDevice(), hidden,
        BlocksArguments{keys, values, key_scales, value_scales, past, tensors, settings, constants}));
}

Tensor kept_decoder_blocks(const Tensor& hidden, int64_t number, const std::optional<Tensor>& cosines,
                           const std::optional<Tensor>& sines, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& length) {
    return run(*kept_blocks().at(number), {hidden, cosines, sines, mask, bias, length});
}

void drop_decoder_blocks(int64_t number) { kept_blocks().drop(number); }

// ---- around the blocks --------------------------------------------------------------------------------------------

Tensor norm_cpu(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                int64_t kind, double epsilon) {
    return norm(CpuDevice(), input, weight, bias, kind, epsilon);
}

std::tuple<Tensor, Tensor> rotary_tables_cpu(const Tensor& positions, const Tensor& frequencies, double scale,
                                             ScalarType dtype) {
    return rotary_tables(CpuDevice(), positions, frequencies, scale, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(autoq, m) {
    m.def(
        "keep_decoder_blocks(Tensor hidden, Tensor[] keys, Tensor[] values, Tensor[] key_scales, "
        "Tensor[] value_scales, int past, Tensor[] tensors, int[] settings, float[] constants) -> int");
    m.def(
        "kept_decoder_blocks(Tensor hidden, int number, Tensor? cosines, Tensor? sines, Tensor? mask, Tensor? bias, "
        "Tensor? length) -> Tensor");
    m.def("drop_decoder_blocks(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("decoder_blocks", TORCH_BOX(&decoder_blocks));
    m.impl("keep_decoder_blocks", TORCH_BOX(&keep_decoder_blocks));
    m.impl("kept_decoder_blocks", TORCH_BOX(&kept_decoder_blocks));
    m.impl("norm", TORCH_BOX(&norm_cpu));
    m.impl("rotary_tables", TORCH_BOX(&rotary_tables_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(autoq, CompositeExplicitAutograd, m) {
    m.impl("drop_decoder_blocks", TORCH_BOX(&drop_decoder_blocks));
}

}  // namespace autoq
