// The CUDA kernels of a decoder block's steps: pointers, sizes and a stream, no torch. Everything in csrc/block.h is
// understood; pointers are to memory of the current device.
//
// All return null, or the message of the launch's error.
#pragma once

#include "../block.h"

namespace autoq::cuda {

// output = norm(first), or sum = first + last, rounded, and output = norm(sum) where `last` is given; `sum` may be
// `last`. Rows of `columns`.
const char* norm(const Norm& norm, const void* first, const void* last, void* sum, void* output, Float dtype,
                 int64_t rows, int64_t columns, void* stream);

// output = first + second (+ third), `count` elements; `output` may be one of them.
const char* add(const void* first, const void* second, const void* third, void* output, Float dtype, int64_t count,
                void* stream);

// output[r, c] = act(input[r, c]) (* input[r, columns + c] where gated) (/ scales[c]); `output` may be `input` where
// it is not gated.
const char* activate(ActivationKind kind, bool gated, const void* input, const void* scales, void* output, Float dtype,
                     int64_t rows, int64_t columns, void* stream);

const char* rotary_tables(const RotaryTables& tables, void* stream);

// Into how many parts `attend` cuts the positions, and the floats of scratch that its partial results take.
const char* attention_splits(const AttentionInput& input, int& splits);
int64_t attention_scratch(const AttentionInput& input, int splits);

// The whole of attention: heads cut, normed and turned, keys and values written to the caches, the result to
// `input.output`. For few tokens, whose time is that of reading the caches.
const char* attend(const AttentionInput& input, int splits, float* scratch, void* stream);

// For many tokens, whose attention is torch's: the same but for attention itself. The queries, turned and scaled, are
// written [batch, tokens, heads, head_dim] in the dtype of the block.
const char* rotate(const AttentionInput& input, void* queries, void* stream);

// The first `positions` of each of `heads` heads of a cache of bytes as values of the dtype, in a cache of that shape.
const char* widen(const CacheView& cache, void* output, Float dtype, int64_t heads, int64_t positions, int64_t head_dim,
                  void* stream);

// What is added to all scores, in the dtype of the block, [batch, heads, tokens, past + tokens].
const char* score_terms(const AttentionInput& input, void* output, void* stream);

}  // namespace autoq::cuda
