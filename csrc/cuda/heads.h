// From a row of the q/k/v projection to heads: cut, normed, turned, and written to the caches. A warp for each head.
#pragma once

#include "../block.h"
#include "values.h"

namespace autoq::cuda {

// The head that starts at a column of a token's row, in fp32, in shared memory. Queries and keys are turned, and normed
// where there is a weight for it; the epsilon of both is one.
__device__ inline void read_head(const AttentionInput& input, const void* norm_weight, bool turned, int64_t batch,
                                 int64_t token, int64_t column, float* head) {
    const int lane = threadIdx.x % kWarp, size = static_cast<int>(input.layout.head_dim);
    const int64_t start = (batch * input.tokens + token) * input.layout.row_size() + column;
    float squares = 0.0f;
    for (int i = lane; i < size; i += kWarp) {
        float value = read_value(input.qkv, input.dtype, start + i);
        if (input.clip > 0.0f) value = value > input.clip ? input.clip : (value < -input.clip ? -input.clip : value);
        head[i] = value;
        squares += value * value;
    }
    if (norm_weight) {
        const float mean = sum_of_lanes(squares) / static_cast<float>(size);
        const float inverse = 1.0f / sqrtf(mean + input.query_norm.epsilon);
        for (int i = lane; i < size; i += kWarp) head[i] *= inverse * read_value(norm_weight, input.dtype, i);
    }
    sync_warp();
    if (!turned || input.rotary.kind == RotaryKind::kNone) return;
    const bool halves = input.rotary.kind == RotaryKind::kHalves;
    const int angles = static_cast<int>(input.rotary.angles);
    const int64_t angle = batch * input.rotary.batch_stride + token * input.rotary.token_stride;
    for (int i = lane; i < angles; i += kWarp) {
        const float cosine = read_value(input.rotary.cosines, input.dtype, angle + i);
        const float sine = read_value(input.rotary.sines, input.dtype, angle + i);
        float& first = head[halves ? i : 2 * i];
        float& second = head[halves ? i + angles : 2 * i + 1];
        const float turned_first = first * cosine - second * sine;
        second = second * cosine + first * sine;
        first = turned_first;
    }
    sync_warp();
}

// The factor that makes bytes of a head: its largest magnitude becomes 127. The scale turns them back; what is not
// finite stays not finite through it.
__device__ inline float scale_of_head(const float* head, int size, float& factor) {
    float largest = 0.0f, infinite = 0.0f;
    for (int i = threadIdx.x % kWarp; i < size; i += kWarp) {
        largest = fmaxf(largest, fabsf(head[i]));
        if (!(fabsf(head[i]) <= 3.4028235e38f)) infinite = 1.0f;
    }
    largest = largest_of_lanes(largest);
    infinite = largest_of_lanes(infinite);
    factor = infinite > 0.0f || largest < 1e-30f ? 0.0f : 127.0f / largest;
    if (infinite > 0.0f) return NAN;
    return factor > 0.0f ? largest / 127.0f : 0.0f;
}

// C: the type of the cache's values, signed bytes where it has scales.
template <typename C>
__device__ inline void write_head(const float* head, int size, void* cache, float* scales, int64_t row) {
    const int lane = threadIdx.x % kWarp;
    C* to = static_cast<C*>(cache) + row * size;
    if constexpr (sizeof(C) == 1) {
        float factor;
        const float scale = scale_of_head(head, size, factor);
        for (int i = lane; i < size; i += kWarp) {
            store_global(to + i, factor > 0.0f ? static_cast<int8_t>(rintf(head[i] * factor)) : int8_t{0});
        }
        if (lane == 0) store_global(scales + row, scale);
    } else {
        for (int i = lane; i < size; i += kWarp) store_global(to + i, from_float<C>(head[i]));
    }
}

// The key or the value head of a new token, into its cache at a position.
template <typename C>
__device__ inline void cache_head(const AttentionInput& input, bool is_key, int64_t batch, int64_t group, int64_t token,
                                  int64_t position, float* scratch) {
    const int64_t column = is_key ? input.layout.key(group) : input.layout.value(group);
    const int64_t row = is_key ? input.keys.row(batch, group, position) : input.values.row(batch, group, position);
    read_head(input, is_key ? input.key_norm.weight : nullptr, is_key, batch, token, column, scratch);
    write_head<C>(scratch, static_cast<int>(input.layout.head_dim), is_key ? input.keys.data : input.values.data,
                  is_key ? input.keys.scales : input.values.scales, row);
    sync_warp();  // before the scratch is used again
}

// How many positions the caches hold: on the device where that changes from token to token.
__device__ inline int64_t positions_held(const AttentionInput& input) {
    if (!input.length) return input.past;
    const int64_t length = load_value(input.length);
    return length < 0 ? 0 : (length < input.past ? length : input.past);  // nothing is touched outside the caches
}

constexpr float kForbidden = -1e30f;  // added to the score of a position that a boolean mask leaves out

__device__ inline float term_at(const ScoreTerm& term, int64_t batch, int64_t head, int64_t token, int64_t position) {
    if (!term.data) return 0.0f;
    const int64_t at = batch * term.batch_stride + head * term.head_stride + token * term.token_stride +
                       position * term.position_stride;
    if (!term.is_boolean) return read_value(term.data, term.dtype, at);
    return load_value(static_cast<const uint8_t*>(term.data) + at) == term.forbidden ? kForbidden : 0.0f;
}

// Calls the function with a value of the type of the caches' values.
template <class Function>
auto with_cache_type(const AttentionInput& input, Function&& function) {
    if (input.keys.scales) return function(int8_t{});
    return with_type(input.dtype, function);
}

}  // namespace autoq::cuda
