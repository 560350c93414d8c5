// The kernels of csrc/cuda that work on a packed weight, for the tests.
#include "../../csrc/cuda/linear.h"

#include <algorithm>
#include <iterator>

#include "../../csrc/cuda/dequantize.h"
#include "device.h"
#include "harness.h"

using namespace autoq;

namespace {

PackedWeight packed_weight(const void* codes, const void* scales, const void* zeros, int bits, int64_t out_features,
                           int64_t in_features, int64_t groups) {
    return {static_cast<const uint32_t*>(codes),
            static_cast<const uint16_t*>(scales),
            static_cast<const uint8_t*>(zeros),
            bits,
            out_features,
            in_features,
            (out_features + kLanes - 1) / kLanes,
            (in_features + kUnitColumns - 1) / kUnitColumns,
            groups,
            in_features / groups};
}

}  // namespace

AUTOQ_EXPORT const char* host_dequantize(const void* codes, const void* scales, const void* zeros, int bits,
                                         int64_t out_features, int64_t in_features, int64_t groups, void* dense,
                                         int dtype) {
    return cuda::dequantize(packed_weight(codes, scales, zeros, bits, out_features, in_features, groups), dense,
                            static_cast<Float>(dtype), nullptr);
}

AUTOQ_EXPORT const char* host_plan(int bits, int64_t out_features, int64_t in_features, int64_t groups, int64_t rows,
                                   int64_t* found) {
    cuda::LinearPlan plan;
    const PackedWeight weight = packed_weight(nullptr, nullptr, nullptr, bits, out_features, in_features, groups);
    if (const char* error = cuda::plan_linear(weight, rows, plan)) return error;
    const int64_t numbers[] = {plan.row_tiles, plan.warps_across, plan.slices,
                               plan.blocks,    plan.whole_tiles,  plan.warpgroups};
    std::copy(std::begin(numbers), std::end(numbers), found);
    return nullptr;
}

AUTOQ_EXPORT const char* host_workspace(int bits, int64_t out_features, int64_t in_features, int64_t groups,
                                        int64_t rows, int row_tiles, int warps_across, int slices, int blocks,
                                        int whole_tiles, int warpgroups, int64_t* found) {
    const PackedWeight weight = packed_weight(nullptr, nullptr, nullptr, bits, out_features, in_features, groups);
    const cuda::LinearPlan plan{row_tiles, warps_across, slices, blocks, whole_tiles != 0, warpgroups != 0};
    if (!cuda::is_possible(plan, bits)) return "there is no such plan";
    *found = cuda::linear_workspace(plan, weight, rows);
    return nullptr;
}

AUTOQ_EXPORT const char* host_linear(const void* codes, const void* scales, const void* zeros, int bits,
                                     int64_t out_features, int64_t in_features, int64_t groups, const void* input,
                                     int dtype, int64_t rows, int64_t columns, const void* bias, void* out,
                                     int overlaps, void* workspace, void* counters, int row_tiles, int warps_across,
                                     int slices, int blocks, int whole_tiles, int warpgroups) {
    const cuda::LinearProblem problem{packed_weight(codes, scales, zeros, bits, out_features, in_features, groups),
                                      static_cast<Float>(dtype),
                                      input,
                                      rows,
                                      columns,
                                      bias,
                                      out,
                                      overlaps != 0};
    for (cuda::host::Buffer& buffer : cuda::host::state().buffers) {
        buffer.is_weight = buffer.begin == codes || buffer.begin == scales || buffer.begin == zeros;
    }
    return cuda::linear(problem, {row_tiles, warps_across, slices, blocks, whole_tiles != 0, warpgroups != 0},
                        workspace, static_cast<uint32_t*>(counters), nullptr);
}
