// Decoder blocks of any family in one call, on any device: norm, q/k/v, attention over the cache, output projection,
// norm, MLP, residuals. What the families differ in are the settings; their meaning, their order and the reference in
// plain torch are in autoq/block_ops.py. The steps are the device's (block_device.h).
#include <torch/csrc/stable/library.h>

#include <array>
#include <utility>

#include "block_device.h"

namespace autoq {
namespace {

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
    const BlockDevice& device;
    const Tensor* tensors;
    const int64_t* settings;
    const double* constants;
    Float dtype;

    bool has(int place) const { return tensors[place].numel() > 0; }
    const void* data(int place) const { return has(place) ? tensors[place].data_ptr() : nullptr; }
    int64_t setting(Setting setting) const { return settings[setting]; }
    float constant(Constant constant) const { return static_cast<float>(constants[constant]); }

    Norm norm(int place, Constant epsilon) const {
        return {static_cast<NormKind>(setting(kNormKind)), data(place), data(place + 1), constant(epsilon)};
    }

    Norm head_norm(int place) const { return {NormKind::kRms, data(place), nullptr, constant(kHeadEpsilon)}; }

    Tensor project(const Tensor& input, int place, Setting bits, int64_t out_features) const {
        std::optional<Tensor> bias;
        if (has(place + 3)) bias = tensors[place + 3];
        return device.linear(input, tensors[place], tensors[place + 1], tensors[place + 2], bias, setting(bits),
                             out_features, setting(kInt8) != 0 ? "int8" : "exact");
    }

    HeadLayout heads() const {
        return {setting(kHeads),       setting(kKvHeads),   setting(kHeadDim),     setting(kQueriesPerGroup),
                setting(kGroupStride), setting(kKeyOffset), setting(kValueOffset), setting(kKvStride)};
    }
};

// The caches of a block, and what all blocks are given.
struct Context {
    const Tensor& keys;
    const Tensor& values;
    const std::optional<Tensor> key_scales;
    const std::optional<Tensor> value_scales;
    const BlocksArguments& given;
};

// ---- steps -------------------------------------------------------------------------------------------------------

Tensor apply_norm(const Block& block, const Tensor& input, int place, Constant epsilon) {
    Tensor output = torch::stable::empty_like(input);
    block.device.norm(block.norm(place, epsilon), input, output);
    return output;
}

void check_part(const Tensor& whole, const Tensor& part) {
    STD_TORCH_CHECK(part.scalar_type() == whole.scalar_type() && part.numel() == whole.numel(),
                    "autoq::decoder_blocks: a part of the block changed the dtype; leave autocast out");
}

// The sum, in the memory of `last`.
Tensor add(const Block& block, const Tensor& first, const Tensor* second, const Tensor& last) {
    check_part(first, last);
    block.device.add(first, second, last);
    return last;
}

// The sum, in the memory of `last`, and its norm.
std::pair<Tensor, Tensor> add_and_norm(const Block& block, const Tensor& first, const Tensor& last, int place,
                                       Constant epsilon) {
    check_part(first, last);
    Tensor output = torch::stable::empty_like(last);
    block.device.add_and_norm(block.norm(place, epsilon), first, last, output);
    return {last, output};
}

Tensor multilayer_perceptron(const Block& block, const Tensor& input) {
    const int64_t columns = block.setting(kIntermediate);
    const bool gated = block.setting(kGated) != 0;
    const Tensor up = block.project(input, kUp, kUpBits, gated ? 2 * columns : columns);
    const Tensor active = gated ? torch::stable::new_empty(up, {input.size(0), input.size(1), columns}) : up;
    const auto kind = static_cast<ActivationKind>(block.setting(kActivation));
    block.device.activate(kind, gated, up, block.data(kActScales), active);
    return block.project(active, kDown, kDownBits, input.size(2));
}

// ---- attention ---------------------------------------------------------------------------------------------------

ScoreTerm score_term(const BlockDevice& device, const std::optional<Tensor>& tensor, const char* name,
                     std::array<int64_t, 4> wanted, bool inverted) {
    if (!tensor) return {nullptr, false, 0, Float::kFloat32, 0, 0, 0, 0};
    const bool is_boolean = tensor->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(is_boolean || is_supported_float(tensor->scalar_type()), "autoq::decoder_blocks: ", name,
                    " must be bool, float32, bfloat16 or float16; convert it");
    STD_TORCH_CHECK(tensor->dim() == 4 && device.holds(*tensor), "autoq::decoder_blocks: ", name,
                    " must be a tensor of four dimensions on ", device.name(), ": batch, heads, tokens, positions");
    int64_t strides[4];
    for (int d = 0; d < 4; ++d) {
        STD_TORCH_CHECK(tensor->size(d) == wanted[d] || tensor->size(d) == 1, "autoq::decoder_blocks: dimension ", d,
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

CacheView cache_view(const Tensor& cache, const std::optional<Tensor>& scales) {
    float* data = scales ? static_cast<float*>(scales->data_ptr()) : nullptr;
    return {cache.data_ptr(), data, cache.size(1), cache.size(2)};
}

// The first `positions` of a cache in the dtype of `like`, for torch.
Tensor dense_cache(const BlockDevice& device, const Tensor& cache, const CacheView& view, const Tensor& like,
                   int64_t positions) {
    Tensor dense = cache;
    if (view.scales) {
        dense = torch::stable::new_empty(cache, {cache.size(0), cache.size(1), cache.size(2), cache.size(3)},
                                         like.scalar_type());
        device.widen(view, positions, dense);
    }
    return torch::stable::narrow(dense, 2, 0, positions);
}

// Every head of [batch, kv_heads, positions, head_dim] so many times, one behind the other.
Tensor repeat_heads(const Tensor& states, int64_t times) {
    const int64_t batch = states.size(0), heads = states.size(1), positions = states.size(2), size = states.size(3);
    const std::vector<int64_t> shape{batch, heads, times, positions, size};
    std::array<StableIValue, 3> stack{torch::stable::detail::from(torch::stable::unsqueeze(states, 2)),
                                      torch::stable::detail::from(shape), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::reshape(torch::stable::detail::to<Tensor>(stack[0]), {batch, heads * times, positions, size});
}

// aten::scaled_dot_product_attention of [batch, heads, tokens, head_dim], scaled already.
Tensor scaled_dot_product_attention(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                    const std::optional<Tensor>& mask, bool shared_keys) {
    std::array<StableIValue, 8> stack{torch::stable::detail::from(queries),
                                      torch::stable::detail::from(keys),
                                      torch::stable::detail::from(values),
                                      torch::stable::detail::from(mask),
                                      torch::stable::detail::from(0.0),
                                      torch::stable::detail::from(!mask.has_value()),
                                      torch::stable::detail::from(std::optional<double>(1.0)),
                                      torch::stable::detail::from(shared_keys)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

AttentionInput attention_input(const Block& block, const Tensor& qkv, const Context& context) {
    const BlocksArguments& given = context.given;
    const int64_t batch = qkv.size(0), tokens = qkv.size(1);
    AttentionInput input{};
    input.layout = block.heads();
    input.dtype = block.dtype;
    input.batch = batch;
    input.tokens = tokens;
    input.past = block.device.held(given.length, given.past);
    input.length = given.length ? static_cast<const int64_t*>(given.length->data_ptr()) : nullptr;
    input.qkv = qkv.data_ptr();
    input.clip = block.constant(kClip);
    input.query_norm = block.head_norm(kQueryNorm);
    input.key_norm = block.head_norm(kKeyNorm);
    input.rotary = {static_cast<RotaryKind>(block.setting(kRotaryKind)), nullptr, nullptr, 0, 0, 0};
    if (given.cosines) {
        const Tensor& cosines = *given.cosines;
        const int64_t angles = cosines.size(2);
        input.rotary.cosines = cosines.data_ptr();
        input.rotary.sines = given.sines->data_ptr();
        input.rotary.angles = input.rotary.kind == RotaryKind::kHalves ? angles / 2 : angles;
        input.rotary.batch_stride = cosines.size(0) == 1 ? 0 : cosines.stride(0);
        input.rotary.token_stride = cosines.stride(1);
    }
    input.keys = cache_view(context.keys, context.key_scales);
    input.values = cache_view(context.values, context.value_scales);
    input.scale = block.constant(kScale);
    const std::array<int64_t, 4> shape{batch, input.layout.heads, tokens, given.past + tokens};
    input.mask = score_term(block.device, given.mask, "mask", shape, block.setting(kInvertedMask) != 0);
    input.bias = score_term(block.device, given.bias, "bias", shape, false);
    return input;
}

// Torch's attention, for many tokens: it multiplies with matrix units. `torch_knows` as in BlockDevice::attends.
Tensor attend_with_torch(const Block& block, const Tensor& qkv, const Context& context, AttentionInput& input,
                         bool torch_knows) {
    const HeadLayout& layout = input.layout;
    const int64_t positions = input.past + input.tokens, shared = layout.heads / layout.kv_heads;
    const Tensor queries = block.device.rotate(input, qkv);
    Tensor keys = dense_cache(block.device, context.keys, input.keys, qkv, positions);
    Tensor values = dense_cache(block.device, context.values, input.values, qkv, positions);
    std::optional<Tensor> terms = context.given.mask;
    if (!torch_knows) terms = block.device.score_terms(input, qkv);
    if (terms && terms->scalar_type() != ScalarType::Bool) terms = torch::stable::to(*terms, qkv.scalar_type());
    if (terms && terms->size(3) > positions) terms = torch::stable::narrow(*terms, 3, 0, positions);
    // On a GPU torch's fast kernels take a mask or shared key heads, not both.
    const bool repeated = shared > 1 && terms && !qkv.is_cpu();
    if (repeated) {
        keys = repeat_heads(keys, shared);
        values = repeat_heads(values, shared);
    }
    const Tensor result = scaled_dot_product_attention(torch::stable::transpose(queries, 1, 2), keys, values, terms,
                                                       shared > 1 && !repeated);
    return torch::stable::reshape(torch::stable::transpose(result, 1, 2),
                                  {input.batch, input.tokens, layout.heads * layout.head_dim});
}

Tensor attention(const Block& block, const Tensor& qkv, const Context& context) {
    AttentionInput input = attention_input(block, qkv, context);
    const bool torch_knows_mask = context.given.mask ? !block.setting(kInvertedMask) : input.past == 0;
    const bool torch_knows = torch_knows_mask && !context.given.bias;
    if (!block.device.attends(input, torch_knows)) return attend_with_torch(block, qkv, context, input, torch_knows);
    const Tensor output =
        torch::stable::new_empty(qkv, {input.batch, input.tokens, input.layout.heads * input.layout.head_dim});
    block.device.attend(input, output);
    return output;
}

// ---- the operator ------------------------------------------------------------------------------------------------

void check_cache(const Block& block, const Tensor& cache, const std::optional<Tensor>& scales, const char* name,
                 const Tensor& hidden, int64_t past) {
    const HeadLayout layout = block.heads();
    const ScalarType wanted = scales ? ScalarType::Char : hidden.scalar_type();
    STD_TORCH_CHECK(block.device.holds(cache) && cache.scalar_type() == wanted, "autoq::decoder_blocks: ", name,
                    " must be on ", block.device.name(),
                    " and have the dtype of the hidden states, or be int8 with scales");
    STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == hidden.size(0) && cache.size(1) == layout.kv_heads &&
                        cache.size(3) == layout.head_dim && cache.is_contiguous(),
                    "autoq::decoder_blocks: ", name, " must be contiguous and have the shape [", hidden.size(0), ", ",
                    layout.kv_heads, ", capacity, ", layout.head_dim, "]");
    STD_TORCH_CHECK(past >= 0 && past + hidden.size(1) <= cache.size(2), "autoq::decoder_blocks: ", name,
                    " has room for ", cache.size(2), " positions, but ", past, " are taken and ", hidden.size(1),
                    " come; make the cache larger");
    if (!scales) return;
    STD_TORCH_CHECK(block.device.holds(*scales) && scales->scalar_type() == ScalarType::Float && scales->dim() == 3 &&
                        scales->size(0) == cache.size(0) && scales->size(1) == cache.size(1) &&
                        scales->size(2) == cache.size(2) && scales->is_contiguous(),
                    "autoq::decoder_blocks: the scales of the ", name,
                    " must be contiguous float32 [batch, heads, capacity] on ", block.device.name());
}

void check_rotary(const std::optional<Tensor>& table, const Block& block, const Tensor& hidden) {
    const bool wanted = block.setting(kRotaryKind) != 0;
    STD_TORCH_CHECK(table.has_value() == wanted,
                    "autoq::decoder_blocks: cosines and sines must be given where positions are rotary, only there");
    if (!table) return;
    STD_TORCH_CHECK(block.device.holds(*table) && table->scalar_type() == hidden.scalar_type() && table->dim() == 3 &&
                        (table->size(0) == 1 || table->size(0) == hidden.size(0)) && table->size(1) == hidden.size(1) &&
                        table->is_contiguous(),
                    "autoq::decoder_blocks: cosines and sines must be contiguous [1 or batch, tokens, angles] on ",
                    block.device.name(), " in the dtype of the hidden states");
    const int64_t turned = table->size(2) * (block.setting(kRotaryKind) == 2 ? 2 : 1);
    STD_TORCH_CHECK(turned <= block.setting(kHeadDim), "autoq::decoder_blocks: cosines turn ", turned,
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
        STD_TORCH_CHECK(block.device.holds(vector) && vector.scalar_type() == hidden.scalar_type() &&
                            vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous(),
                        "autoq::decoder_blocks: tensor ", place, " must be a contiguous vector of ", size,
                        " values on ", block.device.name(), " in the dtype of the hidden states");
    }
}

void check_settings(const Block& block) {
    // Small enough that no product of them overflows.
    for (int i = 0; i < kSettings; ++i) {
        const int64_t setting = block.settings[i];
        STD_TORCH_CHECK(setting >= 0 && setting < (int64_t{1} << 28), "autoq::decoder_blocks: the setting ", setting,
                        " is out of its range");
    }
    const HeadLayout layout = block.heads();
    const int64_t head = layout.head_dim;
    STD_TORCH_CHECK(layout.heads > 0 && layout.kv_heads > 0 && layout.heads % layout.kv_heads == 0 && head > 0 &&
                        head <= kMaxHeadDim && layout.queries_per_group > 0,
                    "autoq::decoder_blocks: ", layout.heads, " heads, ", layout.kv_heads,
                    " key heads and a head size of ", head, " do not go together");
    const auto check_start = [&](int64_t start) {
        STD_TORCH_CHECK(start + head <= layout.row_size(), "autoq::decoder_blocks: the head layout leaves the row of ",
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
                    "autoq::decoder_blocks: a setting is out of its range");
}

void check_length(const BlockDevice& device, const std::optional<Tensor>& length) {
    if (!length) return;
    STD_TORCH_CHECK(device.holds(*length) && length->scalar_type() == ScalarType::Long && length->numel() == 1,
                    "autoq::decoder_blocks: the length must be one int64 on ", device.name());
}

void check(const Block& block, const Context& context, const Tensor& hidden) {
    const BlocksArguments& given = context.given;
    check_settings(block);
    check_cache(block, context.keys, context.key_scales, "keys", hidden, given.past);
    check_cache(block, context.values, context.value_scales, "values", hidden, given.past);
    check_rotary(given.cosines, block, hidden);
    check_rotary(given.sines, block, hidden);
    STD_TORCH_CHECK(!given.cosines || (given.cosines->size(0) == given.sines->size(0) &&
                                       given.cosines->size(2) == given.sines->size(2)),
                    "autoq::decoder_blocks: cosines and sines must have the same shape");
    check_vectors(block, hidden);
    check_length(block.device, given.length);
}

void check_counts(const BlocksArguments& given, size_t blocks) {
    STD_TORCH_CHECK(blocks > 0, "autoq::decoder_blocks: there are no keys, so there is no block");
    STD_TORCH_CHECK(given.tensors.size() == blocks * kPlaces && given.settings.size() == blocks * kSettings &&
                        given.constants.size() == blocks * kConstants,
                    "autoq::decoder_blocks: ", kPlaces, " tensors, ", kSettings, " settings and ", kConstants,
                    " constants are needed of each of ", blocks, " blocks");
    const auto all_or_none = [&](size_t count) { return count == 0 || count == blocks; };
    STD_TORCH_CHECK(given.values.size() == blocks && given.key_scales.size() == given.value_scales.size() &&
                        all_or_none(given.key_scales.size()),
                    "autoq::decoder_blocks: each of ", blocks,
                    " blocks needs keys and values, and both must have scales, or neither");
}

Tensor run_block(const Block& block, const Context& context, const Tensor& hidden) {
    const auto arrangement = static_cast<Arrangement>(block.setting(kArrangement));
    const auto attend = [&](const Tensor& input) {
        const Tensor qkv = block.project(input, kQkv, kQkvBits, block.heads().row_size());
        return block.project(attention(block, qkv, context), kOutput, kOutputBits, hidden.size(2));
    };
    if (arrangement == Arrangement::kPostNorm) {
        const Tensor first = add_and_norm(block, hidden, attend(hidden), kNorm1, kEpsilon1).second;
        return add_and_norm(block, first, multilayer_perceptron(block, first), kNorm2, kEpsilon2).second;
    }
    const Tensor normed = apply_norm(block, hidden, kNorm1, kEpsilon1);
    const Tensor attended = attend(normed);
    if (arrangement == Arrangement::kParallel) {
        const Tensor input = block.has(kNorm2) ? apply_norm(block, hidden, kNorm2, kEpsilon2) : normed;
        return add(block, hidden, &attended, multilayer_perceptron(block, input));
    }
    const bool normed_residual = arrangement == Arrangement::kNormedResidual;
    const auto [middle, input] = add_and_norm(block, normed_residual ? normed : hidden, attended, kNorm2, kEpsilon2);
    return add(block, normed_residual ? input : middle, nullptr, multilayer_perceptron(block, input));
}

}  // namespace

Tensor decoder_blocks(const BlockDevice& device, const BlocksArguments& given) {
    STD_TORCH_CHECK(
        given.hidden.dim() == 3 && device.holds(given.hidden) && is_supported_float(given.hidden.scalar_type()),
        "autoq::decoder_blocks: hidden states must be float32, bfloat16 or float16 [batch, tokens, features] on ",
        device.name());
    const size_t blocks = given.keys.size();
    check_counts(given, blocks);
    Tensor hidden = make_contiguous(given.hidden);
    for (size_t i = 0; i < blocks; ++i) {
        const Block block{device, &given.tensors[i * kPlaces], &given.settings[i * kSettings],
                          &given.constants[i * kConstants], float_of(hidden.scalar_type())};
        const auto scales = [&](const std::vector<Tensor>& all) {
            return all.empty() ? std::nullopt : std::optional<Tensor>(all[i]);
        };
        const Context context{given.keys[i], given.values[i], scales(given.key_scales), scales(given.value_scales),
                              given};
        check(block, context, hidden);
        hidden = hidden.numel() == 0 ? torch::stable::empty_like(hidden) : run_block(block, context, hidden);
    }
    return hidden;
}

}  // namespace autoq
