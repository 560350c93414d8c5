// What the search for ranges and the rounding spend their time on. Knows no torch.
#pragma once

#include <cstdint>

namespace autoq::cpu {

// The errors of groups of weights that are cut to ranges and rounded, on inputs with a Gram matrix for each group.
// Sizes are multiples of 16.
struct GroupErrors {
    const float* weights;  // [rows, groups, size]
    const float* low;      // [rows, groups], as `high`: between them all is cut
    const float* high;
    const float* gram;  // [groups, size, size]
    float* errors;      // [rows, groups]
    int64_t rows, groups, size;
    int bits;
    bool zero_point;  // otherwise the range is symmetric
};

// Channels of a weight that are rounded one after the other, each in view of what the ones before it did to it. All
// outputs are independent.
struct Channels {
    float* values;    // [channels, outputs], as the three below; null for a descent, as `pulls`
    float* pulls;     // how far the values are moved before they are rounded
    float* gradient;  // half of the error's; null for compensation
    float* codes;
    const float* scales;  // [groups, outputs], as `zeros`
    const float* zeros;
    const float* factors;  // [channels, channels]
    int64_t channels, outputs;
    int64_t group_size;  // channels in a group
    int bits;
};

struct SearchKernels {
    // Of one group, rows [begin, end).
    void (*group_errors)(const GroupErrors& work, int64_t group, int64_t begin, int64_t end);
    // `compensate_channels` and `descend_channels` of search_ops.py, for outputs [begin, end).
    void (*compensate)(const Channels& work, int64_t begin, int64_t end);
    void (*descend)(const Channels& work, int64_t begin, int64_t end);
};

extern const SearchKernels portable_search;
#if defined(__x86_64__)
extern const SearchKernels avx2_search;
extern const SearchKernels avx512_search;
#endif

}  // namespace autoq::cpu
