// The kernels of a decoder block's steps, for the tests.
#include "../../csrc/cuda/block.h"

#include "harness.h"

using namespace autoq;

namespace {

ScoreTerm score_term(const void* data, const int64_t* settings) {
    return {data,
            settings[0] == 3,  // a boolean mask
            static_cast<uint8_t>(settings[1]),
            settings[0] == 3 ? Float::kFloat32 : static_cast<Float>(settings[0]),
            settings[2],
            settings[3],
            settings[4],
            settings[5]};
}

// In the order of `attention` in tests/test_cuda_host_block.py.
AttentionInput attention_input(void* const* tensors, const int64_t* s, const float* constants) {
    AttentionInput input{};
    input.layout = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
    input.dtype = static_cast<Float>(s[8]);
    input.batch = s[9];
    input.tokens = s[10];
    input.past = s[11];
    input.qkv = tensors[0];
    input.keys = {tensors[1], static_cast<float*>(tensors[3]), s[1], s[12]};
    input.values = {tensors[2], static_cast<float*>(tensors[4]), s[1], s[12]};
    input.query_norm = {NormKind::kRms, tensors[5], nullptr, constants[0]};
    input.key_norm = {NormKind::kRms, tensors[6], nullptr, constants[0]};
    input.rotary = {static_cast<RotaryKind>(s[13]), tensors[7], tensors[8], s[14], s[15], s[16]};
    input.clip = constants[1];
    input.scale = constants[2];
    input.mask = score_term(tensors[9], s + 17);
    input.bias = score_term(tensors[10], s + 23);
    input.length = static_cast<const int64_t*>(tensors[11]);
    return input;
}

}  // namespace

AUTOQ_EXPORT const char* host_norm(const void* first, const void* last, void* sum, const void* weight, const void* bias,
                                   void* output, int kind, float epsilon, int dtype, int64_t rows, int64_t columns) {
    const Norm norm{static_cast<NormKind>(kind), weight, bias, epsilon};
    return cuda::norm(norm, first, last, sum, output, static_cast<Float>(dtype), rows, columns, nullptr);
}

AUTOQ_EXPORT const char* host_add(const void* first, const void* second, const void* third, void* output, int dtype,
                                  int64_t count) {
    return cuda::add(first, second, third, output, static_cast<Float>(dtype), count, nullptr);
}

AUTOQ_EXPORT const char* host_activate(int kind, bool gated, const void* input, const void* scales, void* output,
                                       int dtype, int64_t rows, int64_t columns) {
    return cuda::activate(static_cast<ActivationKind>(kind), gated, input, scales, output, static_cast<Float>(dtype),
                          rows, columns, nullptr);
}

AUTOQ_EXPORT const char* host_rotary_tables(const int64_t* positions, int64_t count, const float* frequencies,
                                            int64_t angles, float scale, int dtype, void* cosines, void* sines) {
    return cuda::rotary_tables(
        {positions, count, frequencies, angles, scale, static_cast<Float>(dtype), cosines, sines}, nullptr);
}

AUTOQ_EXPORT const char* host_attend(void* qkv, void* keys, void* values, void* key_scales, void* value_scales,
                                     void* query_norm, void* key_norm, void* cosines, void* sines, void* mask,
                                     void* bias, void* length, void* output, void* scratch, int splits,
                                     const int64_t* settings, const float* constants) {
    void* const tensors[] = {qkv,      keys,    values, key_scales, value_scales, query_norm,
                             key_norm, cosines, sines,  mask,       bias,         length};
    AttentionInput input = attention_input(tensors, settings, constants);
    input.output = output;
    int chosen = 0;
    if (const char* error = cuda::attention_splits(input, chosen)) return error;
    return cuda::attend(input, splits ? splits : chosen, static_cast<float*>(scratch), nullptr);
}

// What torch's attention is given.
AUTOQ_EXPORT const char* host_rotate(void* qkv, void* keys, void* values, void* key_scales, void* value_scales,
                                     void* query_norm, void* key_norm, void* cosines, void* sines, void* mask,
                                     void* bias, void* length, void* queries, void* terms, int splits,
                                     const int64_t* settings, const float* constants) {
    void* const tensors[] = {qkv,      keys,    values, key_scales, value_scales, query_norm,
                             key_norm, cosines, sines,  mask,       bias,         length};
    const AttentionInput input = attention_input(tensors, settings, constants);
    (void)splits;
    if (const char* error = cuda::rotate(input, queries, nullptr)) return error;
    return cuda::score_terms(input, terms, nullptr);
}

AUTOQ_EXPORT const char* host_widen(void* cache, void* scales, void* output, int dtype, int64_t heads, int64_t capacity,
                                    int64_t positions, int64_t head_dim) {
    const CacheView view{cache, static_cast<float*>(scales), 1, capacity};
    return cuda::widen(view, output, static_cast<Float>(dtype), heads, positions, head_dim, nullptr);
}
