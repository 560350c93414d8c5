// Norms, residual sums, activations and tables of rotary positions on the GPU. One row or a few values a thread; all of
// it is waiting for memory, so what matters is that accesses are wide and that the next kernel is on its way
// (overlap.h).
#include <algorithm>

#include "block.h"
#include "overlap.h"
#include "values.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;

template <typename T>
constexpr int kWide = 16 / sizeof(T);  // values of one access

// ---- norm --------------------------------------------------------------------------------------------------------

// Accesses whose values a thread keeps: those of a row of up to 16384 16-bit values. It reads the rest of a longer one
// again.
constexpr int kHeld = 2;

template <typename T>
struct NormRows {
    Norm norm;
    const T* first;
    const T* last;  // may be null
    T* sum;
    T* output;
    int64_t columns;
};

// The row's values at a column, with the residual added. The sum is rounded before it is normed, as if it had been
// stored and read again.
template <typename T, int WIDE>
__device__ inline void load_sum(const NormRows<T>& rows, int64_t at, float (&values)[WIDE]) {
    load_values<T>(rows.first + at, values);
    if (!rows.last) return;
    float more[WIDE];
    load_values<T>(rows.last + at, more);
#pragma unroll
    for (int i = 0; i < WIDE; ++i) values[i] = to_float(from_float<T>(values[i] + more[i]));
    store_values<T>(rows.sum + at, values);
}

template <typename T, int WIDE>
__device__ inline void store_normed(const NormRows<T>& rows, int64_t row, int64_t column, float mean, float inverse,
                                    const float (&values)[WIDE]) {
    float weight[WIDE], bias[WIDE], normed[WIDE];
    if (rows.norm.weight) load_values<T>(static_cast<const T*>(rows.norm.weight) + column, weight);
    if (rows.norm.bias) load_values<T>(static_cast<const T*>(rows.norm.bias) + column, bias);
#pragma unroll
    for (int i = 0; i < WIDE; ++i) {
        normed[i] = (values[i] - mean) * inverse;
        if (rows.norm.weight) normed[i] *= weight[i];
        if (rows.norm.bias) normed[i] += bias[i];
    }
    store_values<T>(rows.output + row * rows.columns + column, normed);
}

// One block for each row. Every pass goes over the values that a thread holds, then over those it reads again.
template <typename T, int WIDE>
__global__ void __launch_bounds__(kMostThreads) norm_kernel(NormRows<T> rows) {
    auto* sums = reinterpret_cast<float*>(shared_memory());
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int64_t row = blockIdx.x, start = row * rows.columns, step = static_cast<int64_t>(blockDim.x) * WIDE;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * WIDE, behind = first + kHeld * step;
    const T* source = rows.last ? rows.sum : rows.first;
    float held[kHeld][WIDE], other[WIDE];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
        for (int j = 0; j < WIDE; ++j) held[i][j] = 0.0f;
        if (first + i * step < rows.columns) load_sum<T>(rows, start + first + i * step, held[i]);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) sum += held[i][j];
    }
    for (int64_t column = behind; column < rows.columns; column += step) {
        load_sum<T>(rows, start + column, other);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) sum += other[j];
    }
    const bool centred = rows.norm.kind == NormKind::kLayer;
    const float mean = centred ? sum_of_block(sum, sums) / static_cast<float>(rows.columns) : 0.0f;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (first + i * step >= rows.columns) continue;
#pragma unroll
        for (int j = 0; j < WIDE; ++j) squares += (held[i][j] - mean) * (held[i][j] - mean);
    }
    for (int64_t column = behind; column < rows.columns; column += step) {
        load_values<T>(source + start + column, other);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) squares += (other[j] - mean) * (other[j] - mean);
    }
    squares = sum_of_block(squares, sums);
    const float inverse = 1.0f / sqrtf(squares / static_cast<float>(rows.columns) + rows.norm.epsilon);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int64_t column = first + i * step;
        if (column < rows.columns) store_normed<T>(rows, row, column, mean, inverse, held[i]);
    }
    for (int64_t column = behind; column < rows.columns; column += step) {
        load_values<T>(source + start + column, other);
        store_normed<T>(rows, row, column, mean, inverse, other);
    }
}

// ---- elementwise -------------------------------------------------------------------------------------------------

template <typename T, int WIDE>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* first, const T* second, const T* third, T* output, int64_t count) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * WIDE;
    if (at >= count) return;
    float sum[WIDE], more[WIDE];
    load_values<T>(first + at, sum);
    load_values<T>(second + at, more);
#pragma unroll
    for (int i = 0; i < WIDE; ++i) sum[i] += more[i];
    if (third) {
        load_values<T>(third + at, more);
#pragma unroll
        for (int i = 0; i < WIDE; ++i) sum[i] += more[i];
    }
    store_values<T>(output + at, sum);
}

__device__ inline float sigmoid_weighted(float x, float argument) { return x / (1.0f + expf(-argument)); }

__device__ inline float activation(ActivationKind kind, float x) {
    switch (kind) {
        case ActivationKind::kRelu:
            return x < 0.0f ? 0.0f : x;  // NaN stays
        case ActivationKind::kSilu:
            return sigmoid_weighted(x, x);
        case ActivationKind::kGelu:
            return 0.5f * x * erfcf(-0.70710678f * x);
        case ActivationKind::kGeluTanh:  // x (1 + tanh(u)) / 2 = x / (1 + e^(-2 u))
            return sigmoid_weighted(x, 1.595769122f * (x + 0.044715f * x * x * x));
        default:
            return sigmoid_weighted(x, 1.702f * x);
    }
}

template <typename T>
struct ActivationRows {
    ActivationKind kind;
    bool gated;
    const T* input;
    const T* scales;  // may be null
    T* output;
    uint32_t columns;
    uint32_t packs;  // in all rows
};

template <typename T, int WIDE>
__global__ void __launch_bounds__(kThreads) activate_kernel(ActivationRows<T> rows) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const uint32_t pack = blockIdx.x * kThreads + threadIdx.x;
    if (pack >= rows.packs) return;
    const uint32_t packs_of_row = rows.columns / WIDE, row = pack / packs_of_row;
    const uint32_t column = pack % packs_of_row * WIDE;
    const T* from = rows.input + static_cast<int64_t>(row) * rows.columns * (rows.gated ? 2 : 1) + column;
    float values[WIDE], factors[WIDE];
    load_values<T>(from, values);
#pragma unroll
    for (int i = 0; i < WIDE; ++i) values[i] = activation(rows.kind, values[i]);
    if (rows.gated) {
        load_values<T>(from + rows.columns, factors);
#pragma unroll
        for (int i = 0; i < WIDE; ++i) values[i] *= factors[i];
    }
    if (rows.scales) {
        load_values<T>(rows.scales + column, factors);
#pragma unroll
        for (int i = 0; i < WIDE; ++i) values[i] /= factors[i];
    }
    store_values<T>(rows.output + static_cast<int64_t>(row) * rows.columns + column, values);
}

// ---- rotary positions --------------------------------------------------------------------------------------------

// A thread for each angle of each position. Without the fast sines, which are wrong for large angles.
__global__ void __launch_bounds__(kThreads) tables_kernel(RotaryTables tables) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t position = thread / tables.angles, i = thread % tables.angles;
    if (position >= tables.count) return;
    const float angle =
        static_cast<float>(load_value(tables.positions + position)) * load_value(tables.frequencies + i);
    const float cosine = cosf(angle) * tables.scale, sine = sinf(angle) * tables.scale;
    for (int half = 0; half < 2; ++half) {
        const int64_t at = (2 * position + half) * tables.angles + i;
        write_value(tables.cosines, tables.dtype, at, cosine);
        write_value(tables.sines, tables.dtype, at, sine);
    }
}

// ---- launches ----------------------------------------------------------------------------------------------------

template <typename T>
const char* launch_norm(const NormRows<T>& rows, int64_t count, void* stream) {
    const bool wide = are_aligned({rows.first, rows.last, rows.sum, rows.output, rows.norm.weight, rows.norm.bias}) &&
                      rows.columns % kWide<T> == 0;
    const int64_t packs = wide ? rows.columns / kWide<T> : rows.columns;
    LaunchShape shape;
    if (const char* error = make_grid(count, 1, 1, shape.grid)) return error;
    shape.block.x = static_cast<unsigned>(std::min<int64_t>(kMostThreads, (packs + kWarp - 1) / kWarp * kWarp));
    shape.shared_bytes = kWarp * sizeof(float);
    return wide ? launch_overlapping(norm_kernel<T, kWide<T>>, shape, stream, rows)
                : launch_overlapping(norm_kernel<T, 1>, shape, stream, rows);
}

// Blocks for so many threads.
const char* make_shape(int64_t threads, LaunchShape& shape) {
    shape.block.x = kThreads;
    return make_grid((threads + kThreads - 1) / kThreads, 1, 1, shape.grid);
}

}  // namespace

const char* norm(const Norm& norm, const void* first, const void* last, void* sum, void* output, Float dtype,
                 int64_t rows, int64_t columns, void* stream) {
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const NormRows<T> all{norm,
                              static_cast<const T*>(first),
                              static_cast<const T*>(last),
                              static_cast<T*>(sum),
                              static_cast<T*>(output),
                              columns};
        return launch_norm(all, rows, stream);
    });
}

const char* add(const void* first, const void* second, const void* third, void* output, Float dtype, int64_t count,
                void* stream) {
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](auto kernel, int wide) {
            LaunchShape shape;
            if (const char* error = make_shape(count / wide, shape)) return error;
            return launch_overlapping(kernel, shape, stream, static_cast<const T*>(first),
                                      static_cast<const T*>(second), static_cast<const T*>(third),
                                      static_cast<T*>(output), count);
        };
        const bool wide = are_aligned({first, second, third, output}) && count % kWide<T> == 0;
        return wide ? run(add_kernel<T, kWide<T>>, kWide<T>) : run(add_kernel<T, 1>, 1);
    });
}

const char* activate(ActivationKind kind, bool gated, const void* input, const void* scales, void* output, Float dtype,
                     int64_t rows, int64_t columns, void* stream) {
    return with_type(dtype, [&](auto zero) -> const char* {
        using T = decltype(zero);
        const bool wide = are_aligned({input, scales, output}) && columns % kWide<T> == 0;
        const int64_t packs = rows * columns / (wide ? kWide<T> : 1);
        const ActivationRows<T> all{kind,
                                    gated,
                                    static_cast<const T*>(input),
                                    static_cast<const T*>(scales),
                                    static_cast<T*>(output),
                                    static_cast<uint32_t>(columns),
                                    static_cast<uint32_t>(packs)};
        LaunchShape shape;
        if (packs > 0xffffffff) return "there are too many values for one launch";
        if (const char* error = make_shape(packs, shape)) return error;
        return wide ? launch_overlapping(activate_kernel<T, kWide<T>>, shape, stream, all)
                    : launch_overlapping(activate_kernel<T, 1>, shape, stream, all);
    });
}

const char* rotary_tables(const RotaryTables& tables, void* stream) {
    LaunchShape shape;
    if (const char* error = make_shape(tables.count * tables.angles, shape)) return error;
    return launch_overlapping(tables_kernel, shape, stream, tables);
}

}  // namespace autoq::cuda
