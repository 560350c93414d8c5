// input x weight^T + bias for a packed weight, on the tensor cores: pointers, sizes and a stream, no torch.
#pragma once

#include "../layout.h"

namespace autoq::cuda {

// How the work is cut. A tile is what a block of threads makes at a time: 32 * warps_across outputs of 8 * row_tiles
// rows. It is summed in stages of 128 columns, which the `slices` of the block's warps take in turn. The stages of all
// tiles, one behind the other, are divided among the blocks; where a division falls into a tile, the blocks that share
// it add up their parts in a fixed order.
struct LinearPlan {
    int row_tiles;     // 1 or 4, and for 4 bits 2 or 8
    int warps_across;  // warps side by side along the outputs
    int slices;        // warps behind each other along the columns
    int blocks;
    bool whole_tiles;  // divisions only between tiles
    bool warpgroups;   // Hopper's kernel: 4 bits, 8 row tiles, 4 warps across, 1 slice
};

struct LinearProblem {
    PackedWeight weight;
    Float dtype;        // of input, bias and out: fp16 or bf16
    const void* input;  // [rows, columns], aligned to 16 bytes
    int64_t rows;
    int64_t columns;   // a multiple of 8, at least in_features; those behind must be zero
    const void* bias;  // [out_features] or null
    void* out;         // [rows, out_features]
    // Whether the weight may be read while the kernel before still runs (overlap.h). That one must not write it, and
    // must wait for those before it. Warpgroups do not make use of it.
    bool overlaps;
};

// Up to so many rows the kernels below multiply; for more, it pays to dequantize the weight and let cuBLAS multiply. An
// estimate, until it is measured: at 256 rows a weight's 512 operations take about as long as writing and reading it in
// 16 bits.
constexpr int64_t kMostLinearRows = 256;

// From so many rows a Hopper GPU takes the kernel for warpgroups. None yet, until it is measured: gpu_kernels.py and
// tune_linear.py (benchmarks/) time it beside the other.
constexpr int64_t kLeastWarpgroupRows = kMostLinearRows + 1;

// Whether the kernels can multiply this weight: groups must consist of whole units of 32 columns.
bool linear_takes(const PackedWeight& weight);

// The plan for the current device. Returns null, or what went wrong.
const char* plan_linear(const PackedWeight& weight, int64_t rows, LinearPlan& plan);

// Whether there is a kernel for the plan; it may still want more shared memory than there is.
bool is_possible(const LinearPlan& plan, int bits);

// Bytes of workspace that a plan needs: for the parts of shared tiles, and for the input as warpgroups read it.
int64_t linear_workspace(const LinearPlan& plan, const PackedWeight& weight, int64_t rows);

// Launches on the stream (a cudaStream_t). `counters`, one for each block, must be zero and are zero again afterwards;
// they are for shared tiles alone. `workspace`, aligned to 16 bytes, need not be initialized. Neither may be in use by
// another launch at the same time, but for one that this launch waits for, as it does for all before it on the stream.
// Returns null, or what went wrong.
const char* linear(const LinearProblem& problem, const LinearPlan& plan, void* workspace, uint32_t* counters,
                   void* stream);

}  // namespace autoq::cuda
