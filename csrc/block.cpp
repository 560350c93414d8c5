// Decoder blocks of any family in one call, on any device: norm, q/k/v, attention over the cache, output projection,
// norm, MLP, residuals. What the families differ in are the settings; their meaning, their order and the reference in
// plain torch are in autoq/block_ops.py. The steps are the device's (block_device.h).
//
// All that stays the same from token to token is looked up and checked once (`Block`). Decoding goes through the whole
// weight between one token and the next, so every line of memory that is not in it has to be fetched anew, and asking
// torch for the sizes of five hundred tensors took longer than a tenth of the weight.
#include <torch/csrc/stable/library.h>

#include <array>

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

using Settings = std::array<int64_t, kSettings>;

Settings checked(const Settings& settings) {
    // Small enough that no product of them overflows.
    for (const int64_t setting : settings) {
        STD_TORCH_CHECK(setting >= 0 && setting < (int64_t{1} << 28), "autoq::decoder_blocks: the setting ", setting,
                        " is out of its range");
    }
    STD_TORCH_CHECK(settings[kArrangement] <= 3 && settings[kNormKind] <= 1 && settings[kActivation] <= 4 &&
                        settings[kRotaryKind] <= 2 && settings[kIntermediate] > 0,
                    "autoq::decoder_blocks: a setting is out of its range");
    return settings;
}

HeadLayout checked(const HeadLayout& layout) {
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
    return layout;
}

CacheView cache_view(const Tensor& cache, const std::optional<Tensor>& scales) {
    float* data = scales ? static_cast<float*>(scales->data_ptr()) : nullptr;
    return {cache.data_ptr(), data, cache.size(1), cache.size(2)};
}

}  // namespace

// One decoder block: what its tensors and settings say, checked, and the memory where they are.
struct Block {
    std::vector<Tensor> tensors;
    Settings settings;
    std::array<double, kConstants> constants;
    HeadLayout layout;
    Tensor keys, values;
    std::optional<Tensor> key_scales, value_scales;
    Norm norm1, norm2;
    Projection qkv, output, up, down;
    const void* activation_scales;
    AttentionInput attention{};  // as far as it is the same for every step

    Block(const BlockDevice& device, const Tensor& hidden, const BlocksArguments& given, size_t index)
        : tensors(given.tensors.begin() + index * kPlaces, given.tensors.begin() + (index + 1) * kPlaces),
          settings(checked(part<int64_t, kSettings>(given.settings, index))),
          constants(part<double, kConstants>(given.constants, index)),
          layout(checked(HeadLayout{settings[kHeads], settings[kKvHeads], settings[kHeadDim],
                                    settings[kQueriesPerGroup], settings[kGroupStride], settings[kKeyOffset],
                                    settings[kValueOffset], settings[kKvStride]})),
          keys(given.keys[index]),
          values(given.values[index]),
          key_scales(scales_of(given.key_scales, index)),
          value_scales(scales_of(given.value_scales, index)),
          norm1(norm(kNorm1, kEpsilon1)),
          norm2(norm(kNorm2, kEpsilon2)),
          qkv(projection(hidden, kQkv, kQkvBits, hidden.size(2), layout.row_size())),
          output(projection(hidden, kOutput, kOutputBits, layout.heads * layout.head_dim, hidden.size(2))),
          up(projection(hidden, kUp, kUpBits, hidden.size(2), settings[kIntermediate] * (is_gated() ? 2 : 1))),
          down(projection(hidden, kDown, kDownBits, settings[kIntermediate], hidden.size(2))),
          activation_scales(data(kActScales)) {
        check_vectors(device, hidden);
        check_cache(device, hidden, keys, key_scales, "keys", given.past);
        check_cache(device, hidden, values, value_scales, "values", given.past);
        attention.layout = layout;
        attention.dtype = float_of(hidden.scalar_type());
        attention.batch = hidden.size(0);
        attention.tokens = hidden.size(1);
        attention.clip = static_cast<float>(constants[kClip]);
        attention.query_norm = head_norm(kQueryNorm);
        attention.key_norm = head_norm(kKeyNorm);
        attention.rotary.kind = static_cast<RotaryKind>(settings[kRotaryKind]);
        attention.keys = cache_view(keys, key_scales);
        attention.values = cache_view(values, value_scales);
        attention.scale = static_cast<float>(constants[kScale]);
    }

    bool has(int place) const { return tensors[place].numel() > 0; }
    const void* data(int place) const { return has(place) ? tensors[place].data_ptr() : nullptr; }
    bool is_gated() const { return settings[kGated] != 0; }
    Arrangement arrangement() const { return static_cast<Arrangement>(settings[kArrangement]); }

  private:
    template <class T, size_t SIZE>
    static std::array<T, SIZE> part(const std::vector<T>& all, size_t index) {
        std::array<T, SIZE> own;
        std::copy_n(all.begin() + index * SIZE, SIZE, own.begin());
        return own;
    }

    static std::optional<Tensor> scales_of(const std::vector<Tensor>& all, size_t index) {
        return all.empty() ? std::nullopt : std::optional<Tensor>(all[index]);
    }

    Norm norm(int place, Constant epsilon) const {
        const auto kind = static_cast<NormKind>(settings[kNormKind]);
        return {kind, data(place), data(place + 1), static_cast<float>(constants[epsilon])};
    }

    Norm head_norm(int place) const {
        return {NormKind::kRms, data(place), nullptr, static_cast<float>(constants[kHeadEpsilon])};
    }

    Projection projection(const Tensor& hidden, int place, Setting bits, int64_t in_features,
                          int64_t out_features) const {
        std::optional<Tensor> bias;
        if (has(place + 3)) bias = make_contiguous(tensors[place + 3]);
        check_linear(hidden, bias, out_features, "exact");
        return {PackedTensors(tensors[place], tensors[place + 1], tensors[place + 2], settings[bits], out_features,
                              in_features),
                bias, settings[kInt8] != 0};
    }

    void check_vectors(const BlockDevice& device, const Tensor& hidden) const {
        const int64_t columns = hidden.size(2);
        const std::pair<int, int64_t> vectors[] = {{kNorm1, columns},
                                                   {kNorm1 + 1, columns},
                                                   {kNorm2, columns},
                                                   {kNorm2 + 1, columns},
                                                   {kActScales, settings[kIntermediate]},
                                                   {kQueryNorm, layout.head_dim},
                                                   {kKeyNorm, layout.head_dim}};
        for (const auto& [place, size] : vectors) {
            if (!has(place)) continue;
            const Tensor& vector = tensors[place];
            STD_TORCH_CHECK(device.holds(vector) && vector.scalar_type() == hidden.scalar_type() && vector.dim() == 1 &&
                                vector.size(0) == size && vector.is_contiguous(),
                            "autoq::decoder_blocks: tensor ", place, " must be a contiguous vector of ", size,
                            " values on ", device.name(), " in the dtype of the hidden states");
        }
        for (const Projection* linear : {&qkv, &output, &up, &down}) {
            const PackedTensors& packed = linear->packed;
            STD_TORCH_CHECK(device.holds(packed.codes) && device.holds(packed.scales) && device.holds(packed.zeros),
                            "autoq::decoder_blocks: codes, scales and zeros must be on ", device.name(),
                            ", as the hidden states are; move them there");
        }
    }

    void check_cache(const BlockDevice& device, const Tensor& hidden, const Tensor& cache,
                     const std::optional<Tensor>& scales, const char* name, int64_t past) const {
        const ScalarType wanted = scales ? ScalarType::Char : hidden.scalar_type();
        STD_TORCH_CHECK(device.holds(cache) && cache.scalar_type() == wanted, "autoq::decoder_blocks: ", name,
                        " must be on ", device.name(),
                        " and have the dtype of the hidden states, or be int8 with scales");
        STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == hidden.size(0) && cache.size(1) == layout.kv_heads &&
                            cache.size(3) == layout.head_dim && cache.is_contiguous(),
                        "autoq::decoder_blocks: ", name, " must be contiguous and have the shape [", hidden.size(0),
                        ", ", layout.kv_heads, ", capacity, ", layout.head_dim, "]");
        STD_TORCH_CHECK(past >= 0 && past + hidden.size(1) <= cache.size(2), "autoq::decoder_blocks: ", name,
                        " has room for ", cache.size(2), " positions, but ", past, " are taken and ", hidden.size(1),
                        " come; make the cache larger");
        if (!scales) return;
        STD_TORCH_CHECK(device.holds(*scales) && scales->scalar_type() == ScalarType::Float && scales->dim() == 3 &&
                            scales->size(0) == cache.size(0) && scales->size(1) == cache.size(1) &&
                            scales->size(2) == cache.size(2) && scales->is_contiguous(),
                        "autoq::decoder_blocks: the scales of the ", name,
                        " must be contiguous float32 [batch, heads, capacity] on ", device.name());
    }
};

namespace {

// A block at work.
struct Run {
    const BlockDevice& device;
    const Block& block;
    const StepArguments& step;
    AttentionInput attention;
    Workspace& workspace;

    const Tensor& like() const { return step.hidden; }
    Values project(const Values& input, const Projection& projection) const {
        return device.linear(input, projection, workspace);
    }
};

// ---- steps -------------------------------------------------------------------------------------------------------

Values apply_norm(const Run& run, const Norm& norm, const Values& input) {
    Values output = run.workspace.empty(run.like(), input->columns);
    run.device.norm(norm, *input, *output);
    return output;
}

void check_part(const Buffer& whole, const Buffer& part) {
    STD_TORCH_CHECK(part.dtype == whole.dtype && part.rows == whole.rows && part.columns == whole.columns,
                    "autoq::decoder_blocks: a part of the block changed the dtype; leave autocast out");
}

// The sum, in the memory of `last`.
Values add(const Run& run, const Values& first, const Values& second, const Values& last) {
    check_part(*first, *last);
    run.device.add(*first, second.get(), *last);
    return last;
}

// The sum, in the memory of `last`, and its norm.
std::pair<Values, Values> add_and_norm(const Run& run, const Norm& norm, const Values& first, const Values& last) {
    check_part(*first, *last);
    Values output = run.workspace.empty(run.like(), last->columns);
    run.device.add_and_norm(norm, *first, *last, *output);
    return {last, output};
}

Values multilayer_perceptron(const Run& run, const Values& input) {
    const Block& block = run.block;
    const Values up = run.project(input, block.up);
    const bool gated = block.is_gated();
    const Values active = gated ? run.workspace.empty(run.like(), block.settings[kIntermediate]) : up;
    const auto kind = static_cast<ActivationKind>(block.settings[kActivation]);
    run.device.activate(kind, gated, *up, block.activation_scales, *active);
    return run.project(active, block.down);
}

// ---- attention ---------------------------------------------------------------------------------------------------

ScoreTerm score_term(const BlockDevice& device, const std::optional<Tensor>& tensor, const char* name,
                     std::array<int64_t, 4> wanted, uint8_t forbidden) {
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
    return {tensor->data_ptr(), is_boolean, forbidden,  is_boolean ? Float::kFloat32 : float_of(tensor->scalar_type()),
            strides[0],         strides[1], strides[2], strides[3]};
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

// Torch's attention, for many tokens: it multiplies with matrix units. `torch_knows` as in BlockDevice::attends.
Values attend_with_torch(const Run& run, const Tensor& qkv, AttentionInput& input, bool torch_knows) {
    const HeadLayout& layout = input.layout;
    const int64_t positions = input.past + input.tokens, shared = layout.heads / layout.kv_heads;
    const Tensor queries = run.device.rotate(input, qkv);
    Tensor keys = dense_cache(run.device, run.block.keys, input.keys, qkv, positions);
    Tensor values = dense_cache(run.device, run.block.values, input.values, qkv, positions);
    std::optional<Tensor> terms = run.step.mask;
    if (!torch_knows) terms = run.device.score_terms(input, qkv);
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
    return values_of(make_contiguous(torch::stable::reshape(
        torch::stable::transpose(result, 1, 2), {input.batch, input.tokens, layout.heads * layout.head_dim})));
}

Values attend(const Run& run, const Values& qkv) {
    AttentionInput input = run.attention;
    input.qkv = qkv->data;
    const bool torch_knows_mask = run.step.mask ? !run.block.settings[kInvertedMask] : input.past == 0;
    const bool torch_knows = torch_knows_mask && !run.step.bias;
    if (!run.device.attends(input, torch_knows)) return attend_with_torch(run, qkv->tensor, input, torch_knows);
    const Values output = run.workspace.empty(run.like(), input.layout.heads * input.layout.head_dim);
    run.device.attend(input, *output);
    return output;
}

Values run_block(const Run& run, const Values& hidden) {
    const Block& block = run.block;
    const Arrangement arrangement = block.arrangement();
    const auto attended = [&](const Values& input) {
        return run.project(attend(run, run.project(input, block.qkv)), block.output);
    };
    if (arrangement == Arrangement::kPostNorm) {
        const Values first = add_and_norm(run, block.norm1, hidden, attended(hidden)).second;
        return add_and_norm(run, block.norm2, first, multilayer_perceptron(run, first)).second;
    }
    const Values normed = apply_norm(run, block.norm1, hidden);
    if (arrangement == Arrangement::kParallel) {
        const Values attention = attended(normed);
        const Values input = block.has(kNorm2) ? apply_norm(run, block.norm2, hidden) : normed;
        return add(run, hidden, attention, multilayer_perceptron(run, input));
    }
    const bool normed_residual = arrangement == Arrangement::kNormedResidual;
    const auto [middle, input] = add_and_norm(run, block.norm2, normed_residual ? normed : hidden, attended(normed));
    return add(run, normed_residual ? input : middle, nullptr, multilayer_perceptron(run, input));
}

// ---- a step ------------------------------------------------------------------------------------------------------

// What attention is told that is new in this step, whatever the block.
struct StepTerms {
    const StepArguments& step;
    int64_t past = 0;
    int64_t columns = 0;  // of the tables of cosines and sines
    Rotary tables{};      // but for the kind and the number of angles
    int64_t heads = 0;    // for which the terms are
    ScoreTerm mask{}, bias{};

    StepTerms(const BlockDevice& device, const StepArguments& step_, int64_t most) : step(step_) {
        check_length(device);
        past = device.held(step.length, most);
        STD_TORCH_CHECK(
            step.cosines.has_value() == step.sines.has_value(),
            "autoq::decoder_blocks: cosines and sines must be given where positions are rotary, only there");
        if (!step.cosines) return;
        check_table(device, *step.cosines);
        check_table(device, *step.sines);
        STD_TORCH_CHECK(step.cosines->size(0) == step.sines->size(0) && step.cosines->size(2) == step.sines->size(2),
                        "autoq::decoder_blocks: cosines and sines must have the same shape");
        columns = step.cosines->size(2);
        tables.cosines = step.cosines->data_ptr();
        tables.sines = step.sines->data_ptr();
        tables.batch_stride = step.cosines->size(0) == 1 ? 0 : step.cosines->stride(0);
        tables.token_stride = step.cosines->stride(1);
    }

    AttentionInput input(const BlockDevice& device, const Block& block, int64_t most) {
        AttentionInput input = block.attention;
        input.past = past;
        input.length = step.length ? static_cast<const int64_t*>(step.length->data_ptr()) : nullptr;
        const RotaryKind kind = input.rotary.kind;
        STD_TORCH_CHECK(
            (kind != RotaryKind::kNone) == step.cosines.has_value(),
            "autoq::decoder_blocks: cosines and sines must be given where positions are rotary, only there");
        const int64_t turned = kind == RotaryKind::kPairs ? 2 * columns : columns;
        STD_TORCH_CHECK(turned <= input.layout.head_dim, "autoq::decoder_blocks: cosines turn ", turned,
                        " columns of a head of ", input.layout.head_dim);
        input.rotary = tables;
        input.rotary.kind = kind;
        input.rotary.angles = turned / 2;
        if (heads != input.layout.heads) {
            heads = input.layout.heads;
            const std::array<int64_t, 4> shape{input.batch, heads, input.tokens, most + input.tokens};
            mask = score_term(device, step.mask, "mask", shape, 0);
            bias = score_term(device, step.bias, "bias", shape, 0);
        }
        input.mask = mask;
        input.mask.forbidden = block.settings[kInvertedMask] != 0 ? 1 : 0;
        input.bias = bias;
        return input;
    }

  private:
    void check_table(const BlockDevice& device, const Tensor& table) const {
        const Tensor& hidden = step.hidden;
        STD_TORCH_CHECK(device.holds(table) && table.scalar_type() == hidden.scalar_type() && table.dim() == 3 &&
                            (table.size(0) == 1 || table.size(0) == hidden.size(0)) &&
                            table.size(1) == hidden.size(1) && table.is_contiguous(),
                        "autoq::decoder_blocks: cosines and sines must be contiguous [1 or batch, tokens, angles] on ",
                        device.name(), " in the dtype of the hidden states");
    }

    void check_length(const BlockDevice& device) const {
        if (!step.length) return;
        STD_TORCH_CHECK(
            device.holds(*step.length) && step.length->scalar_type() == ScalarType::Long && step.length->numel() == 1,
            "autoq::decoder_blocks: the length must be one int64 on ", device.name());
    }
};

void check_hidden(const BlockDevice& device, const Tensor& hidden) {
    STD_TORCH_CHECK(hidden.dim() == 3 && device.holds(hidden) && is_supported_float(hidden.scalar_type()),
                    "autoq::decoder_blocks: hidden states must be float32, bfloat16 or float16 [batch, tokens, "
                    "features] on ",
                    device.name());
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

}  // namespace

DecoderBlocks::DecoderBlocks(const BlockDevice& device, const Tensor& hidden, const BlocksArguments& given)
    : past_(given.past) {
    check_hidden(device, hidden);
    check_counts(given, given.keys.size());
    shape_.assign(hidden.sizes().begin(), hidden.sizes().end());
    dtype_ = hidden.scalar_type();
    blocks_.reserve(given.keys.size());
    for (size_t i = 0; i < given.keys.size(); ++i) blocks_.emplace_back(device, hidden, given, i);
}

DecoderBlocks::~DecoderBlocks() = default;

Tensor DecoderBlocks::run(const BlockDevice& device, const StepArguments& step) {
    check_hidden(device, step.hidden);
    STD_TORCH_CHECK(step.hidden.scalar_type() == dtype_ && step.hidden.size(0) == shape_[0] &&
                        step.hidden.size(1) == shape_[1] && step.hidden.size(2) == shape_[2],
                    "autoq::decoder_blocks: the hidden states are [", step.hidden.size(0), ", ", step.hidden.size(1),
                    ", ", step.hidden.size(2), "], but the blocks were kept for [", shape_[0], ", ", shape_[1], ", ",
                    shape_[2], "] in the dtype of the first step; keep them anew");
    StepTerms terms(device, step, past_);
    if (step.hidden.numel() == 0) return torch::stable::empty_like(step.hidden);
    Values hidden = values_of(make_contiguous(step.hidden));
    for (const Block& block : blocks_) {
        hidden = run_block({device, block, step, terms.input(device, block, past_), workspace_}, hidden);
    }
    return workspace_.give(hidden);
}

}  // namespace autoq
