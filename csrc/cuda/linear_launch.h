// Which kernels there are behind linear.h, and their launches. The kernels are compiled in files of their own, side by
// side: linear_half.cu, linear_bfloat16.cu and warpgroup.cu.
#pragma once

#include "tiles.h"

namespace autoq::cuda {

// ---- linear_kernel.h ------------------------------------------------------------------------------------------------

// 4 bits come in every size, the others, less common, in two.
constexpr bool has_kernel(int bits, int row_tiles) {
    return row_tiles == 1 || row_tiles == 4 || (bits == 4 && (row_tiles == 2 || row_tiles == 8));
}

// The most threads of a block; more registers for more rows.
constexpr int max_threads(int row_tiles) { return row_tiles == 1 ? 512 : 256; }

template <typename T>
const char* launch_linear(const LinearArguments& arguments, int bits, int row_tiles, const LaunchShape& shape,
                          void* stream);

// ---- warpgroup_kernel.h ---------------------------------------------------------------------------------------------

constexpr int kWarpgroupBits = 4;
constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupRowTiles = 8;

// Whether this build has the kernel.
bool has_warpgroups();

// Bytes of the input in the order that the kernel wants.
int64_t arranged_bytes(int row_parts, int stages);

// Puts the input in order, in `arranged`, and multiplies.
const char* launch_warpgroups(LinearArguments arguments, Float dtype, void* arranged, const LaunchShape& shape,
                              void* stream);

}  // namespace autoq::cuda
