// The steps of a decoder block between its linears: norm, rotary positions, attention, activation; and linears that are
// not quantized. Knows no torch.
//
// Each instruction set fills in one table of them, from the same source (block_kernels.h). Unlike the linears, the sets
// may differ in the last bit. All arithmetic is fp32, and results are rounded once, to the dtype of the hidden states.
// But products of bf16 pairs, where there are such, take rotated queries, weights and what a cache of bytes holds
// rounded to bf16: in attention of four queries or more to the same keys, in a bf16 model.
#pragma once

#include "../block.h"

namespace autoq::cpu {

// output = input weight^T (+ bias), all of one dtype, row-major and contiguous; `bias` may be null.
struct DenseProduct {
    const void* input;   // [rows, columns]
    const void* weight;  // [outputs, columns]
    const void* bias;    // [outputs]
    void* output;        // [rows, outputs]
    Float dtype;
    int64_t rows, columns, outputs;
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
    // Positions [begin, end).
    void (*rotary_tables)(const RotaryTables& tables, int64_t begin, int64_t end);
    // Rows [begin, end) of a cache of bytes, all heads and positions counted, as values of the dtype.
    void (*widen)(const CacheView& cache, void* output, Float dtype, int64_t head_dim, int64_t begin, int64_t end);
    // Attention of `count` query heads, beginning with `head`, all of the same key head, for tokens
    // [first, first + tokens) of one sequence.
    void (*attend)(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first,
                   int64_t tokens);
    // Outputs [begin, end) of all rows. A row's results do not depend on the others.
    void (*multiply_dense)(const DenseProduct& product, int64_t begin, int64_t end);
};

extern const BlockKernels portable_block;
#if defined(__x86_64__)
extern const BlockKernels avx2_block;
extern const BlockKernels avx512_block;
extern const BlockKernels avx512_bf16_block;
#endif

}  // namespace autoq::cpu
