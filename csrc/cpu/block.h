// The steps of a decoder block between its linears: norm, rotary positions, attention, activation. Knows no torch.
//
// Each instruction set fills in one table of them, from the same source (block_kernels.h). All arithmetic is fp32;
// results are rounded once, to the dtype of the hidden states. Unlike the linears, the sets may differ in the last bit.
#pragma once

#include "../layout.h"

namespace autoq::cpu {

constexpr int64_t kMaxHeadDim = 1024;

enum class NormKind { kLayer, kRms };
enum class ActivationKind { kRelu, kSilu, kGelu, kGeluTanh, kQuickGelu };
enum class RotaryKind { kNone, kHalves, kPairs };

// A norm over the last dimension. `weight` and `bias` may be null; they have the dtype of the values.
struct Norm {
    NormKind kind;
    const void* weight;
    const void* bias;
    float epsilon;
};

// Where the heads are in a row of the merged q/k/v projection. Query head h starts at
// `(h / queries_per_group) * group_stride + (h % queries_per_group) * head_dim`, key head g at
// `key_offset + g * kv_stride`, value head g at `value_offset + g * kv_stride`.
struct HeadLayout {
    int64_t heads, kv_heads, head_dim;
    int64_t queries_per_group, group_stride;
    int64_t key_offset, value_offset, kv_stride;

    int64_t row_size() const { return (heads + 2 * kv_heads) * head_dim; }
    int64_t query(int64_t head) const {
        return head / queries_per_group * group_stride + head % queries_per_group * head_dim;
    }
    int64_t key(int64_t head) const { return key_offset + head * kv_stride; }
    int64_t value(int64_t head) const { return value_offset + head * kv_stride; }
};

// Rotary positions of a token: cosines and sines, `angles` of each. kHalves turns (x[i], x[i + angles]), kPairs
// (x[2 i], x[2 i + 1]); what is behind 2 * angles stays.
struct Rotary {
    RotaryKind kind;
    const void* cosines;
    const void* sines;
    int64_t angles;
    int64_t batch_stride, token_stride;  // in elements; a batch stride of 0 is one table for all sequences
};

// Keys or values of all positions, [batch, kv_heads, capacity, head_dim], contiguous. With `scales` they are signed
// bytes, and each position of a head has a scale, fp32 [batch, kv_heads, capacity]; without, they have the dtype of the
// block.
struct CacheView {
    void* data;
    float* scales;
    int64_t kv_heads, capacity;

    // Which row of head_dim values, and which scale.
    int64_t row(int64_t batch, int64_t head, int64_t position) const {
        return (batch * kv_heads + head) * capacity + position;
    }
};

// What is added to the scores, or forbids positions: [batch, heads, tokens, positions] with strides in elements,
// 0 where it is the same for all. `data` may be null.
struct ScoreTerm {
    const void* data;
    bool is_boolean;  // bytes; a position is left out where the byte equals `forbidden`
    uint8_t forbidden;
    Float dtype;  // of added terms
    int64_t batch_stride, head_stride, token_stride, position_stride;
};

struct AttentionInput {
    HeadLayout layout;
    Float dtype;
    int64_t batch, tokens, past;
    const void* qkv;            // [batch, tokens, row_size]
    float clip;                 // q, k and v are cut to [-clip, clip]; 0: they are not
    Norm query_norm, key_norm;  // over head_dim, without weight: none
    Rotary rotary;
    CacheView keys, values;
    float scale;  // of the scores
    ScoreTerm mask, bias;
    float* queries;  // scratch [batch, tokens, heads, padded head_dim]
    void* output;    // [batch, tokens, heads, head_dim]

    int64_t padded_head_dim() const { return (layout.head_dim + kLanes - 1) / kLanes * kLanes; }
};

struct BlockKernels {
    // Rows [begin, end) of width `columns`.
    void (*norm)(const Norm& norm, const void* input, void* output, Float dtype, int64_t columns, int64_t begin,
                 int64_t end);
    // output = first + second (+ third), elements [begin, end). `third` may be null; `output` may be one of them.
    void (*add)(const void* first, const void* second, const void* third, void* output, Float dtype, int64_t begin,
                int64_t end);
    // output[r, c] = act(input[r, c]) (* input[r, columns + c] where gated) (/ scales[c]), rows [begin, end).
    void (*activate)(ActivationKind kind, bool gated, const void* input, const void* scales, void* output, Float dtype,
                     int64_t columns, int64_t begin, int64_t end);
    // For tokens [begin, end) of batch * tokens: rotated keys and the values go into the caches, rotated queries into
    // `queries`.
    void (*rotate)(const AttentionInput& input, int64_t begin, int64_t end);
    // Rows [begin, end) of a cache of bytes, all heads and positions counted, as values of the dtype.
    void (*widen)(const CacheView& cache, void* output, Float dtype, int64_t head_dim, int64_t begin, int64_t end);
    // Attention of `count` query heads, beginning with `head`, all of the same key head, for tokens
    // [first, first + tokens) of one sequence.
    void (*attend)(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first,
                   int64_t tokens);
};

extern const BlockKernels portable_block;
#if defined(__x86_64__)
extern const BlockKernels avx2_block;
extern const BlockKernels avx512_block;
#endif

}  // namespace autoq::cpu
