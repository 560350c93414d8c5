// Launches Hopper's kernel for many rows, and what puts its input in order.
#include "warpgroup_kernel.h"

namespace autoq::cuda {
namespace {

constexpr int kArrangeThreads = kArrangedRows * kStageUnits;

// A block puts a stage of 64 rows in order, a thread a unit of a row. Columns behind `columns` are zero, and so are
// rows behind `rows`.
__global__ void __launch_bounds__(kArrangeThreads)
    arrange_kernel(const uint16_t* input, int rows, int columns, uint4* arranged) {
    const int row = static_cast<int>(threadIdx.x) % kArrangedRows, unit = static_cast<int>(threadIdx.x) / kArrangedRows;
    const int stage = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
    const int from_row = part * kArrangedRows + row;
    const int first = (stage * kStageUnits + unit) * kUnitColumns;
    uint32_t pairs[kUnitPieces][4];
#pragma unroll
    for (int j = 0; j < kUnitPieces; ++j) {
        const int column = first + j * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (from_row < rows && column < columns) {
            x = load_global(reinterpret_cast<const uint4*>(input + static_cast<int64_t>(from_row) * columns + column));
        }
        pair_columns(x, pairs[j]);
    }
    const int64_t unit_of_all = (static_cast<int64_t>(part) * gridDim.x + stage) * kStageUnits + unit;
#pragma unroll
    for (int i = 0; i < kUnitPieces; ++i) {
        store_global(arranged + (unit_of_all * kUnitPieces + i) * kArrangedRows + row,
                     make_uint4(pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]));
    }
}

}  // namespace

bool has_warpgroups() { return kTakesWarpgroups; }

int64_t arranged_bytes(int row_parts, int stages) { return static_cast<int64_t>(row_parts) * stages * kArrangedBytes; }

const char* launch_warpgroups(LinearArguments arguments, Float dtype, void* arranged, const LaunchShape& shape,
                              void* stream) {
    const LaunchShape parts{{static_cast<unsigned>(arguments.stages), static_cast<unsigned>(arguments.row_parts)},
                            {kArrangeThreads}};
    if (const char* error = launch(arrange_kernel, parts, stream, arguments.input, arguments.rows, arguments.columns,
                                   static_cast<uint4*>(arranged))) {
        return error;
    }
    arguments.input = static_cast<const uint16_t*>(arranged);
    return dtype == Float::kBFloat16 ? launch(warpgroup_kernel<BFloat16>, shape, stream, arguments)
                                     : launch(warpgroup_kernel<Half>, shape, stream, arguments);
}

}  // namespace autoq::cuda
