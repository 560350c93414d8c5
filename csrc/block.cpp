// One decoder block of any family in one call, on the CPU: norm, q/k/v, attention over the cache, output projection,
// norm, MLP, residuals. What the families differ in are the settings; their meaning, their order and the reference in
// plain torch are in autoq/block_ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string>

#include "cpu/kernels.h"
#include "ops.h"

namespace autoq {
namespace {

using cpu::AttentionInput;

// The kernels in use.
const cpu::BlockKernels& block_kernels() { return *cpu::kernels().block; }

// From so many tokens on torch's attention, which multiplies with matrix units, is faster than ours.
constexpr int64_t kManyTokens = 16;

// Below this many elements a thread is not worth waking.
constexpr int64_t kElementsPerThread = 1 << 14;

enum class Arrangement { kSequential, kNormedResidual, kPostNorm, kParallel };

// The places of the tensors in the list, a linear's four together.
enum Place {
    kNorm1 = 0,
    kQkv = 2,
    kOutput = 6,
    kNorm2 = 10,
    kUp = 12,
    kDown = 16,
    kActScales = 20,
    kQueryNorm,
    kKeyNorm,
    kPlaces
};

enum Setting {
    kHeads,
    kKvHeads,
    kHeadDim,
    kQueriesPerGroup,
    kGroupStride,
    kKeyOffset,
    kValueOffset,
    kKvStride,
    kArrangement,
    kNormKind,
    kActivation,
    kGated,
    kIntermediate,
    kRotaryKind,
    kInvertedMask,
    kQkvBits,
    kOutputBits,
    kUpBits,
    kDownBits,
    kInt8,
    kSettings
};

enum Constant { kEpsilon1, kEpsilon2, kHeadEpsilon, kScale, kClip, kConstants };

struct Block {
    const std::vector<Tensor>& tensors;
    const std::vector<int64_t>& settings;
    const std::vector<double>& constants;
    Float dtype;

    bool has(int place) const { return tensors[place].numel() > 0; }
    const void* data(int place) const { return has(place) ? tensors[place].data_ptr() : nullptr; }
    int64_t setting(Setting setting) const { return settings[setting]; }
    float constant(Constant constant) const { return static_cast<float>(constants[constant]); }

    cpu::Norm norm(int place, Constant epsilon) const {
        return {static_cast<cpu::NormKind>(setting(kNormKind)), data(place), data(place + 1), constant(epsilon)};
    }

    cpu::Norm head_norm(int place) const { return {cpu::NormKind::kRms, data(place), nullptr, constant(kHeadEpsilon)}; }

    Tensor project(const Tensor& input, int place, Setting bits, int64_t out_features) const {
        std::optional<Tensor> bias;
        if (has(place + 3)) bias = tensors[place + 3];
        return linear(input, tensors[place], tensors[place + 1], tensors[place + 2], bias, setting(bits), out_features,
                      setting(kInt8) != 0 ? "int8" : "exact");
    }

    cpu::HeadLayout heads() const {
        return {setting(kHeads),       setting(kKvHeads),   setting(kHeadDim),     setting(kQueriesPerGroup),
                setting(kGroupStride), setting(kKeyOffset), setting(kValueOffset), setting(kKvStride)};
    }
};

// ---- steps -------------------------------------------------------------------------------------------------------

Tensor apply_norm(const Block& block, const Tensor& input, int place, Constant epsilon) {
    Tensor output = torch::stable::empty_like(input);
    const int64_t columns = input.size(2), rows = input.size(0) * input.size(1);
    const cpu::Norm norm = block.norm(place, epsilon);
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(1, kElementsPerThread / columns), [&](int64_t begin, int64_t end) {
            block_kernels().norm(norm, input.data_ptr(), output.data_ptr(), block.dtype, columns, begin, end);
        });
    return output;
}

// The sum, in the memory of `last`.
Tensor add(const Block& block, const Tensor& first, const Tensor* second, const Tensor& last) {
    STD_TORCH_CHECK(last.scalar_type() == first.scalar_type() && last.numel() == first.numel(),
                    "autoq::decoder_block: a part of the block changed the dtype; leave autocast out");
    torch::stable::parallel_for(0, last.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
        block_kernels().add(first.data_ptr(), last.data_ptr(), second ? second->data_ptr() : nullptr, last.data_ptr(),
                            block.dtype, begin, end);
    });
    return last;
}

Tensor multilayer_perceptron(const Block& block, const Tensor& input) {
    const int64_t columns = block.setting(kIntermediate), rows = input.size(0) * input.size(1);
    const bool gated = block.setting(kGated) != 0;
    const Tensor up = block.project(input, kUp, kUpBits, gated ? 2 * columns : columns);
    Tensor active = gated ? torch::stable::new_empty(up, {input.size(0), input.size(1), columns}) : up;
    const auto kind = static_cast<cpu::ActivationKind>(block.setting(kActivation));
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerThread / columns),
                                [&](int64_t begin, int64_t end) {
                                    block_kernels().activate(kind, gated, up.data_ptr(), block.data(kActScales),
                                                             active.data_ptr(), block.dtype, columns, begin, end);
                                });
    return block.project(active, kDown, kDownBits, input.size(2));
}

// ---- attention ---------------------------------------------------------------------------------------------------

cpu::ScoreTerm score_term(const std::optional<Tensor>& tensor, const char* name, std::array<int64_t, 4> wanted,
                          bool inverted) {
    if (!tensor) return {nullptr, false, 0, Float::kFloat32, 0, 0, 0, 0};
    const bool is_boolean = tensor->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(is_boolean || is_supported_float(tensor->scalar_type()), "autoq::decoder_block: ", name,
                    " must be bool, float32, bfloat16 or float16; convert it");
    STD_TORCH_CHECK(tensor->dim() == 4 && tensor->is_cpu(), "autoq::decoder_block: ", name,
                    " must be a tensor of four dimensions on the CPU: batch, heads, tokens, positions");
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) {
        STD_TORCH_CHECK(tensor->size(d) == wanted[d] || tensor->size(d) == 1, "autoq::decoder_block: dimension ", d,
                        " of ", name, " is ", tensor->size(d), " but must be 1 or ", wanted[d]);
        strides[d] = tensor->size(d) == 1 ? 0 : tensor->stride(d);
    }
    return {tensor->data_ptr(),
            is_boolean,
            static_cast<uint8_t>(inverted ? 1 : 0),
            is_boolean ? Float::kFloat32 : float_of(tensor->scalar_type()),
            strides[0],
            strides[1],
            strides[2],
            strides[3]};
}

cpu::CacheView cache_view(const Tensor& cache, const std::optional<Tensor>& scales) {
    float* data = scales ? static_cast<float*>(scales->data_ptr()) : nullptr;
    return {cache.data_ptr(), data, cache.size(1), cache.size(2)};
}

// The first `positions` of a cache in the dtype of `like`, for torch.
Tensor dense_cache(const Tensor& cache, const cpu::CacheView& view, const Tensor& like, int64_t positions) {
    Tensor dense = cache;
    if (view.scales) {
        dense = torch::stable::new_empty(cache, {cache.size(0), cache.size(1), cache.size(2), cache.size(3)},
                                         like.scalar_type());
        const int64_t heads = cache.size(0) * cache.size(1);
        torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) {
                block_kernels().widen(view, dense.data_ptr(), float_of(like.scalar_type()), cache.size(3),
                                      head * view.capacity, head * view.capacity + positions);
            }
        });
    }
    return torch::stable::narrow(dense, 2, 0, positions);
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
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
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

// aten::scaled_dot_product_attention of [batch, heads, tokens, head_dim], scaled already.
Tensor attend_with_torch(const Tensor& queries, const Tensor& keys, const Tensor& values,
                         const std::optional<Tensor>& mask, bool shared_keys) {
    std::array<StableIValue, 8> stack{torch::stable::detail::from(queries),
                                      torch::stable::detail::from(keys),
                                      torch::stable::detail::from(values),
                                      torch::stable::detail::from(mask),
                                      torch::stable::detail::from(0.0),
                                      torch::stable::detail::from(!mask.has_value()),
                                      torch::stable::detail::from(std::optional<double>(1.0)),
                                      torch::stable::detail::from(shared_keys)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Cache {
    Tensor keys, values;
    std::optional<Tensor> key_scales, value_scales;
};

Tensor attention(const Block& block, const Tensor& qkv, const Cache& cache, int64_t past,
                 const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& bias) {
    const int64_t batch = qkv.size(0), tokens = qkv.size(1);
    AttentionInput input{};
    input.layout = block.heads();
    input.dtype = block.dtype;
    input.batch = batch;
    input.tokens = tokens;
    input.past = past;
    input.qkv = qkv.data_ptr();
    input.clip = block.constant(kClip);
    input.query_norm = block.head_norm(kQueryNorm);
    input.key_norm = block.head_norm(kKeyNorm);
    input.rotary = {static_cast<cpu::RotaryKind>(block.setting(kRotaryKind)), nullptr, nullptr, 0, 0, 0};
    if (cosines) {
        const int64_t angles = cosines->size(2);
        input.rotary.cosines = cosines->data_ptr();
        input.rotary.sines = sines->data_ptr();
        input.rotary.angles = input.rotary.kind == cpu::RotaryKind::kHalves ? angles / 2 : angles;
        input.rotary.batch_stride = cosines->size(0) == 1 ? 0 : cosines->stride(0);
        input.rotary.token_stride = cosines->stride(1);
    }
    input.keys = cache_view(cache.keys, cache.key_scales);
    input.values = cache_view(cache.values, cache.value_scales);
    input.scale = block.constant(kScale);
    const int64_t heads = input.layout.heads, size = input.layout.head_dim;
    const std::array<int64_t, 4> score_shape{batch, heads, tokens, past + tokens};
    input.mask = score_term(mask, "mask", score_shape, block.setting(kInvertedMask) != 0);
    input.bias = score_term(bias, "bias", score_shape, false);
    Tensor queries = torch::stable::new_empty(qkv, {batch, tokens, heads, input.padded_head_dim()}, ScalarType::Float);
    input.queries = static_cast<float*>(queries.data_ptr());
    torch::stable::parallel_for(0, batch * tokens, std::max<int64_t>(1, kElementsPerThread / input.layout.row_size()),
                                [&](int64_t begin, int64_t end) { block_kernels().rotate(input, begin, end); });
    const bool torch_knows_mask = mask ? !block.setting(kInvertedMask) : past == 0;
    if (tokens >= kManyTokens && !bias && torch_knows_mask) {
        const ScalarType dtype = qkv.scalar_type();
        std::optional<Tensor> terms = mask;
        if (terms && terms->scalar_type() != ScalarType::Bool) terms = torch::stable::to(*terms, dtype);
        Tensor own = torch::stable::to(torch::stable::narrow(queries, 3, 0, size), dtype);
        const Tensor result = attend_with_torch(
            torch::stable::transpose(own, 1, 2), dense_cache(cache.keys, input.keys, qkv, past + tokens),
            dense_cache(cache.values, input.values, qkv, past + tokens), terms, heads != input.layout.kv_heads);
        return torch::stable::reshape(torch::stable::transpose(result, 1, 2), {batch, tokens, heads * size});
    }
    Tensor output = torch::stable::new_empty(qkv, {batch, tokens, heads * size});
    input.output = output.data_ptr();
    attend_directly(input);
    return output;
}

// ---- the operator ------------------------------------------------------------------------------------------------

void check_cache(const Tensor& cache, const std::optional<Tensor>& scales, const char* name, const Tensor& hidden,
                 const cpu::HeadLayout& layout, int64_t past) {
    const ScalarType wanted = scales ? ScalarType::Char : hidden.scalar_type();
    STD_TORCH_CHECK(cache.is_cpu() && cache.scalar_type() == wanted, "autoq::decoder_block: ", name,
                    " must be on the CPU and have the dtype of the hidden states, or be int8 with scales");
    STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == hidden.size(0) && cache.size(1) == layout.kv_heads &&
                        cache.size(3) == layout.head_dim && cache.is_contiguous(),
                    "autoq::decoder_block: ", name, " must be contiguous and have the shape [", hidden.size(0), ", ",
                    layout.kv_heads, ", capacity, ", layout.head_dim, "]");
    STD_TORCH_CHECK(past >= 0 && past + hidden.size(1) <= cache.size(2), "autoq::decoder_block: ", name,
                    " has room for ", cache.size(2), " positions, but ", past, " are taken and ", hidden.size(1),
                    " come; make the cache larger");
    if (!scales) return;
    STD_TORCH_CHECK(scales->is_cpu() && scales->scalar_type() == ScalarType::Float && scales->dim() == 3 &&
                        scales->size(0) == cache.size(0) && scales->size(1) == cache.size(1) &&
                        scales->size(2) == cache.size(2) && scales->is_contiguous(),
                    "autoq::decoder_block: the scales of the ", name,
                    " must be contiguous float32 [batch, heads, capacity] on the CPU");
}

void check_rotary(const std::optional<Tensor>& table, const Block& block, const Tensor& hidden) {
    const bool wanted = block.setting(kRotaryKind) != 0;
    STD_TORCH_CHECK(table.has_value() == wanted,
                    "autoq::decoder_block: cosines and sines must be given where positions are rotary, only there");
    if (!table) return;
    STD_TORCH_CHECK(
        table->is_cpu() && table->scalar_type() == hidden.scalar_type() && table->dim() == 3 &&
            (table->size(0) == 1 || table->size(0) == hidden.size(0)) && table->size(1) == hidden.size(1) &&
            table->is_contiguous(),
        "autoq::decoder_block: cosines and sines must be contiguous [1 or batch, tokens, angles] on the CPU "
        "in the dtype of the hidden states");
    const int64_t turned = table->size(2) * (block.setting(kRotaryKind) == 2 ? 2 : 1);
    STD_TORCH_CHECK(turned <= block.setting(kHeadDim), "autoq::decoder_block: cosines turn ", turned,
                    " columns of a head of ", block.setting(kHeadDim));
}

void check_vectors(const Block& block, const Tensor& hidden) {
    const int64_t columns = hidden.size(2);
    const std::pair<int, int64_t> vectors[] = {{kNorm1, columns},
                                               {kNorm1 + 1, columns},
                                               {kNorm2, columns},
                                               {kNorm2 + 1, columns},
                                               {kActScales, block.setting(kIntermediate)},
                                               {kQueryNorm, block.setting(kHeadDim)},
                                               {kKeyNorm, block.setting(kHeadDim)}};
    for (const auto& [place, size] : vectors) {
        if (!block.has(place)) continue;
        const Tensor& vector = block.tensors[place];
        STD_TORCH_CHECK(vector.is_cpu() && vector.scalar_type() == hidden.scalar_type() && vector.dim() == 1 &&
                            vector.size(0) == size && vector.is_contiguous(),
                        "autoq::decoder_block: tensor ", place, " must be a contiguous vector of ", size,
                        " values on the CPU in the dtype of the hidden states");
    }
}

void check_settings(const Block& block) {
    // Small enough that no product of them overflows.
    for (const int64_t setting : block.settings) {
        STD_TORCH_CHECK(setting >= 0 && setting < (int64_t{1} << 28), "autoq::decoder_block: the setting ", setting,
                        " is out of its range");
    }
    const cpu::HeadLayout layout = block.heads();
    const int64_t head = layout.head_dim;
    STD_TORCH_CHECK(layout.heads > 0 && layout.kv_heads > 0 && layout.heads % layout.kv_heads == 0 && head > 0 &&
                        head <= cpu::kMaxHeadDim && layout.queries_per_group > 0,
                    "autoq::decoder_block: ", layout.heads, " heads, ", layout.kv_heads,
                    " key heads and a head size of ", head, " do not go together");
    const auto check_start = [&](int64_t start) {
        STD_TORCH_CHECK(start + head <= layout.row_size(), "autoq::decoder_block: the head layout leaves the row of ",
                        layout.row_size(), " values");
    };
    for (int64_t h = 0; h < layout.heads; ++h) check_start(layout.query(h));
    for (int64_t g = 0; g < layout.kv_heads; ++g) {
        check_start(layout.key(g));
        check_start(layout.value(g));
    }
    STD_TORCH_CHECK(block.setting(kArrangement) <= 3 && block.setting(kNormKind) <= 1 &&
                        block.setting(kActivation) <= 4 && block.setting(kRotaryKind) <= 2 &&
                        block.setting(kIntermediate) > 0,
                    "autoq::decoder_block: a setting is out of its range");
}

Tensor decoder_block(const Tensor& hidden_, const Tensor& keys, const Tensor& values,
                     const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales, int64_t past,
                     const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                     const std::vector<Tensor>& tensors, const std::vector<int64_t>& settings,
                     const std::vector<double>& constants) {
    STD_TORCH_CHECK(
        hidden_.dim() == 3 && hidden_.is_cpu() && is_supported_float(hidden_.scalar_type()),
        "autoq::decoder_block: hidden states must be float32, bfloat16 or float16 [batch, tokens, features] "
        "on the CPU");
    STD_TORCH_CHECK(tensors.size() == kPlaces && settings.size() == kSettings && constants.size() == kConstants,
                    "autoq::decoder_block: ", kPlaces, " tensors, ", kSettings, " settings and ", kConstants,
                    " constants are needed");
    const Tensor hidden = make_contiguous(hidden_);
    const Block block{tensors, settings, constants, float_of(hidden.scalar_type())};
    check_settings(block);
    STD_TORCH_CHECK(key_scales.has_value() == value_scales.has_value(),
                    "autoq::decoder_block: keys and values must both have scales, or neither");
    check_cache(keys, key_scales, "keys", hidden, block.heads(), past);
    check_cache(values, value_scales, "values", hidden, block.heads(), past);
    const Cache cache{keys, values, key_scales, value_scales};
    check_rotary(cosines, block, hidden);
    check_rotary(sines, block, hidden);
    STD_TORCH_CHECK(!cosines || (cosines->size(0) == sines->size(0) && cosines->size(2) == sines->size(2)),
                    "autoq::decoder_block: cosines and sines must have the same shape");
    check_vectors(block, hidden);
    if (hidden.numel() == 0) return torch::stable::empty_like(hidden);

    const auto arrangement = static_cast<Arrangement>(block.setting(kArrangement));
    const auto attend = [&](const Tensor& input) {
        const Tensor qkv = block.project(input, kQkv, kQkvBits, block.heads().row_size());
        const Tensor mixed = attention(block, qkv, cache, past, cosines, sines, mask, bias);
        return block.project(mixed, kOutput, kOutputBits, hidden.size(2));
    };
    if (arrangement == Arrangement::kPostNorm) {
        const Tensor first = apply_norm(block, add(block, hidden, nullptr, attend(hidden)), kNorm1, kEpsilon1);
        const Tensor second = add(block, first, nullptr, multilayer_perceptron(block, first));
        return apply_norm(block, second, kNorm2, kEpsilon2);
    }
    const Tensor normed = apply_norm(block, hidden, kNorm1, kEpsilon1);
    const Tensor attended = attend(normed);
    if (arrangement == Arrangement::kParallel) {
        const Tensor input = block.has(kNorm2) ? apply_norm(block, hidden, kNorm2, kEpsilon2) : normed;
        return add(block, hidden, &attended, multilayer_perceptron(block, input));
    }
    const bool normed_residual = arrangement == Arrangement::kNormedResidual;
    const Tensor middle = add(block, normed_residual ? normed : hidden, nullptr, attended);
    const Tensor input = apply_norm(block, middle, kNorm2, kEpsilon2);
    return add(block, normed_residual ? input : middle, nullptr, multilayer_perceptron(block, input));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) { m.impl("decoder_block", TORCH_BOX(&decoder_block)); }

}  // namespace autoq
