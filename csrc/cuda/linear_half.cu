#include "linear_kernel.h"

namespace autoq::cuda {

template <>
const char* launch_linear<Half>(const LinearArguments& arguments, int bits, int row_tiles, const LaunchShape& shape,
                                void* stream) {
    return launch_linear_bits<Half>(arguments, bits, row_tiles, shape, stream);
}

}  // namespace autoq::cuda
