// What the kernels of a decoder block are told, on every device: norms, heads, rotary positions, caches, masks. Knows
// no torch.
#pragma once

#include "layout.h"

namespace autoq {

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

    AUTOQ_HOST_DEVICE int64_t row_size() const { return (heads + 2 * kv_heads) * head_dim; }
    AUTOQ_HOST_DEVICE int64_t query(int64_t head) const {
        return head / queries_per_group * group_stride + head % queries_per_group * head_dim;
    }
    AUTOQ_HOST_DEVICE int64_t key(int64_t head) const { return key_offset + head * kv_stride; }
    AUTOQ_HOST_DEVICE int64_t value(int64_t head) const { return value_offset + head * kv_stride; }
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

// What rotary positions turn by: scale * cos and scale * sin of position * frequency, [positions, 2 * angles], both
// halves of a row alike.
struct RotaryTables {
    const int64_t* positions;
    int64_t count;
    const float* frequencies;
    int64_t angles;
    float scale;
    Float dtype;  // of the tables
    void* cosines;
    void* sines;
};

// Keys or values of all positions, [batch, kv_heads, capacity, head_dim], contiguous. With `scales` they are signed
// bytes, and each position of a head has a scale, fp32 [batch, kv_heads, capacity]; without, they have the dtype of the
// block.
struct CacheView {
    void* data;
    float* scales;
    int64_t kv_heads, capacity;

    // Which row of head_dim values, and which scale.
    AUTOQ_HOST_DEVICE int64_t row(int64_t batch, int64_t head, int64_t position) const {
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
    int64_t batch, tokens;
    int64_t past;               // positions that the caches hold
    const int64_t* length;      // on a GPU: where that number is found at run time, `past` at most; null: it is `past`
    const void* qkv;            // [batch, tokens, row_size]
    float clip;                 // q, k and v are cut to [-clip, clip]; 0: they are not
    Norm query_norm, key_norm;  // over head_dim, without weight: none
    Rotary rotary;
    CacheView keys, values;
    float scale;  // of the scores
    ScoreTerm mask, bias;
    float* queries;  // scratch of the CPU's kernels [batch, tokens, heads, padded head_dim]
    void* output;    // [batch, tokens, heads, head_dim]

    int64_t padded_head_dim() const { return (layout.head_dim + kLanes - 1) / kLanes * kLanes; }
};

}  // namespace autoq
