// The kernels of csrc/cuda that work on a packed weight, for the tests.
#include "../../csrc/cuda/dequantize.h"
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
