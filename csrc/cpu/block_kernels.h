// The block's kernels in one source for every instruction set. Included by block_kernels.cpp, once for each, inside its
// namespace and its target region; no include guard.
#include "attention_kernels.h"

// ---- norm --------------------------------------------------------------------------------------------------------

template <Float DTYPE>
AUTOQ_VECTOR void norm_row(const Norm& norm, const void* input, void* output, int64_t from, int64_t to,
                           int64_t columns) {
    Lanes sum{}, squares{};
    float mean = 0.0f;
    if (norm.kind == NormKind::kLayer) {
        for_each_step(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            sum += load_some<DTYPE>(input, from + column, count);
        });
        mean = sum_of(sum) / static_cast<float>(columns);
    }
    for_each_step(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        Lanes value = load_some<DTYPE>(input, from + column, count) - all_lanes(mean);
        if (count < 16) value = first_lanes(value, count);  // the lanes behind the row are not values
        squares = multiply_add(value, value, squares);
    });
    const float inverse = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(columns) + norm.epsilon);
    for_each_step(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        Lanes value = load_some<DTYPE>(input, from + column, count) - all_lanes(mean);
        value *= all_lanes(inverse);
        if (norm.weight) value *= load_some<DTYPE>(norm.weight, column, count);
        if (norm.bias) value += load_some<DTYPE>(norm.bias, column, count);
        store_some<DTYPE>(output, to + column, count, value);
    });
}

template <Float DTYPE>
void norm_rows(const Norm& norm, const void* input, void* output, int64_t columns, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        norm_row<DTYPE>(norm, input, output, row * columns, row * columns, columns);
    }
}

// ---- elementwise -------------------------------------------------------------------------------------------------

template <Float DTYPE>
void add_values(const void* first, const void* second, const void* third, void* output, int64_t begin, int64_t end) {
    for_each_step(end - begin, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        Lanes sum = load_some<DTYPE>(first, begin + column, count) + load_some<DTYPE>(second, begin + column, count);
        if (third) sum += load_some<DTYPE>(third, begin + column, count);
        store_some<DTYPE>(output, begin + column, count, sum);
    });
}

AUTOQ_VECTOR Lanes sigmoid_weighted(Lanes x, Lanes argument) { return x / (1.0f + exponential(-argument)); }

// erf by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
AUTOQ_VECTOR Lanes gelu(Lanes x) {
    const Lanes z = larger(x, -x) * 0.70710678f;
    const Lanes t = 1.0f / multiply_add(z, all_lanes(0.3275911f), all_lanes(1.0f));
    Lanes sum = all_lanes(1.061405429f);
    sum = multiply_add(sum, t, all_lanes(-1.453152027f));
    sum = multiply_add(sum, t, all_lanes(1.421413741f));
    sum = multiply_add(sum, t, all_lanes(-0.284496736f));
    sum = multiply_add(sum, t, all_lanes(0.254829592f));
    const Lanes tail = 0.5f * sum * t * exponential(-z * z);  // (1 - erf(z)) / 2
    return x * where_less(x, Lanes{}, tail, 1.0f - tail);
}

AUTOQ_VECTOR Lanes activation(ActivationKind kind, Lanes x) {
    switch (kind) {
        case ActivationKind::kRelu:
            return where_less(x, Lanes{}, Lanes{}, x);  // NaN stays
        case ActivationKind::kSilu:
            return sigmoid_weighted(x, x);
        case ActivationKind::kGelu:
            return gelu(x);
        case ActivationKind::kGeluTanh:  // x (1 + tanh(u)) / 2 = x / (1 + e^(-2 u))
            return sigmoid_weighted(x, 1.595769122f * multiply_add(x * x * x, all_lanes(0.044715f), x));
        default:
            return sigmoid_weighted(x, 1.702f * x);
    }
}

template <Float DTYPE>
void activate_rows(ActivationKind kind, bool gated, const void* input, const void* scales, void* output,
                   int64_t columns, int64_t begin, int64_t end) {
    const int64_t width = gated ? 2 * columns : columns;
    for (int64_t row = begin; row < end; ++row) {
        for_each_step(columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            Lanes value = activation(kind, load_some<DTYPE>(input, row * width + column, count));
            if (gated) value *= load_some<DTYPE>(input, row * width + columns + column, count);
            if (scales) value /= load_some<DTYPE>(scales, column, count);
            store_some<DTYPE>(output, row * columns + column, count, value);
        });
    }
}

// ---- rotary positions --------------------------------------------------------------------------------------------

template <Float DTYPE>
AUTOQ_VECTOR void read_head(const AttentionInput& input, const Norm& norm, int64_t index, float* head) {
    const int64_t size = input.layout.head_dim;
    for_each_step(size, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        Lanes value = load_some<DTYPE>(input.qkv, index + column, count);
        if (input.clip > 0.0f) {
            const Lanes bound = all_lanes(input.clip);
            value = where_less(bound, value, bound, where_less(value, -bound, -bound, value));
        }
        store<Float::kFloat32>(head, column, value);
    });
    if (!norm.weight) return;
    Lanes squares{};
    for_each_step(size, [&](int64_t column, int64_t) __attribute__((always_inline)) {
        const Lanes value = load<Float::kFloat32>(head, column);
        squares = multiply_add(value, value, squares);
    });
    const float inverse = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(size) + norm.epsilon);
    for_each_step(size, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        const Lanes value = load<Float::kFloat32>(head, column) * all_lanes(inverse);
        store<Float::kFloat32>(head, column, value * load_some<DTYPE>(norm.weight, column, count));
    });
}

template <Float DTYPE>
AUTOQ_VECTOR void rotate_head(const Rotary& rotary, int64_t angle, float* head) {
    if (rotary.kind == RotaryKind::kNone) return;
    const bool halves = rotary.kind == RotaryKind::kHalves;
    for (int64_t i = 0; i < rotary.angles; ++i) {
        const float cosine = load_float(rotary.cosines, DTYPE, angle + i);
        const float sine = load_float(rotary.sines, DTYPE, angle + i);
        float& first = head[halves ? i : 2 * i];
        float& second = head[halves ? i + rotary.angles : 2 * i + 1];
        const float turned = first * cosine - second * sine;
        second = second * cosine + first * sine;
        first = turned;
    }
}

// A head as bytes and the scale that turns them back: its largest magnitude becomes 127.
AUTOQ_VECTOR float narrow_head(const float* head, int64_t size, int8_t* bytes) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < size; ++i) {
        const float magnitude = std::fabs(head[i]);
        finite &= magnitude < INFINITY;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (!finite || largest < 1e-30f) {
        std::memset(bytes, 0, static_cast<size_t>(size));
        return finite ? 0.0f : NAN;  // what is not finite stays not finite
    }
    for (int64_t i = 0; i < size; ++i) bytes[i] = static_cast<int8_t>(std::nearbyint(head[i] * (127.0f / largest)));
    return largest / 127.0f;
}

template <Float DTYPE>
AUTOQ_VECTOR void write_head(const float* head, int64_t size, const CacheView& cache, int64_t row) {
    if (cache.scales) {
        cache.scales[row] = narrow_head(head, size, static_cast<int8_t*>(cache.data) + row * size);
        return;
    }
    for_each_step(size, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        store_some<DTYPE>(cache.data, row * size + column, count, load<Float::kFloat32>(head, column));
    });
}

template <Float DTYPE>
void rotate_tokens(const AttentionInput& input, int64_t begin, int64_t end) {
    const HeadLayout& layout = input.layout;
    const int64_t size = layout.head_dim, padded = input.padded_head_dim();
    const Norm none{NormKind::kRms, nullptr, nullptr, 0.0f};
    alignas(64) float head[kMaxHeadDim + 16] = {0};
    for (int64_t index = begin; index < end; ++index) {
        const int64_t batch = index / input.tokens, token = index % input.tokens;
        const int64_t row = index * layout.row_size();
        const int64_t angle = batch * input.rotary.batch_stride + token * input.rotary.token_stride;
        for (int64_t h = 0; h < layout.heads; ++h) {
            read_head<DTYPE>(input, input.query_norm, row + layout.query(h), head);
            rotate_head<DTYPE>(input.rotary, angle, head);
            float* query = input.queries + (index * layout.heads + h) * padded;
            for_each_step(padded, [&](int64_t column, int64_t) __attribute__((always_inline)) {
                const Lanes value = load<Float::kFloat32>(head, column) * all_lanes(input.scale);
                store<Float::kFloat32>(query, column, value);
            });
        }
        const int64_t position = input.past + token;
        for (int64_t g = 0; g < layout.kv_heads; ++g) {
            read_head<DTYPE>(input, input.key_norm, row + layout.key(g), head);
            rotate_head<DTYPE>(input.rotary, angle, head);
            write_head<DTYPE>(head, size, input.keys, input.keys.row(batch, g, position));
            read_head<DTYPE>(input, none, row + layout.value(g), head);
            write_head<DTYPE>(head, size, input.values, input.values.row(batch, g, position));
        }
    }
}

template <Float DTYPE>
void fill_tables(const RotaryTables& tables, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
        const int64_t row = p * 2 * tables.angles;
        for (int64_t i = 0; i < tables.angles; ++i) {
            const float angle = static_cast<float>(tables.positions[p]) * tables.frequencies[i];
            const float cosine = std::cos(angle) * tables.scale, sine = std::sin(angle) * tables.scale;
            for (const int64_t at : {row + i, row + tables.angles + i}) {
                store_float(tables.cosines, DTYPE, at, cosine);
                store_float(tables.sines, DTYPE, at, sine);
            }
        }
    }
}

// ---- dense linears -------------------------------------------------------------------------------------------------

// Rows and outputs whose sums fit the registers together.
constexpr int64_t kDenseRows = kRegisters == 1 ? 4 : 2;
constexpr int64_t kDenseOutputs = 4;

// `inputs` are the rows in fp32, each filled up with zeros to `padded` columns.
template <Float DTYPE, int ROWS, int OUTPUTS>
AUTOQ_VECTOR void multiply_dense_tile(const DenseProduct& product, const float* inputs, int64_t padded, int64_t row,
                                      int64_t output) {
    Lanes sums[ROWS][OUTPUTS] = {};
    for_each_step(product.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        Lanes values[ROWS];
        for (int r = 0; r < ROWS; ++r) values[r] = load<Float::kFloat32>(inputs, (row + r) * padded + column);
        for (int o = 0; o < OUTPUTS; ++o) {
            const int64_t place = (output + o) * product.columns + column;
            const Lanes weight = load_some<DTYPE>(product.weight, place, count);
            for (int r = 0; r < ROWS; ++r) sums[r][o] = multiply_add(values[r], weight, sums[r][o]);
        }
    });
    for (int r = 0; r < ROWS; ++r) {
        for (int o = 0; o < OUTPUTS; ++o) {
            const float bias = product.bias ? load_float(product.bias, DTYPE, output + o) : 0.0f;
            const int64_t place = (row + r) * product.outputs + output + o;
            store_float(product.output, DTYPE, place, sum_of(sums[r][o]) + bias);
        }
    }
}

template <Float DTYPE, int OUTPUTS>
void multiply_dense_outputs(const DenseProduct& product, const float* inputs, int64_t padded, int64_t output) {
    // What comes after these outputs, while these are multiplied.
    constexpr int64_t kItemBytes = DTYPE == Float::kFloat32 ? 4 : 2;
    const int64_t bytes = OUTPUTS * product.columns * kItemBytes, next = (output + OUTPUTS) * product.columns;
    const char* ahead = static_cast<const char*>(product.weight) + next * kItemBytes;
    if (output + 2 * OUTPUTS <= product.outputs) {
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
    }
    int64_t row = 0;
    for (; row + kDenseRows <= product.rows; row += kDenseRows) {
        // As many sums as registers hold.
        for (int64_t o = 0; o < OUTPUTS; o += kDenseRows) {
            constexpr int kSome = OUTPUTS < kDenseRows ? OUTPUTS : kDenseRows;
            multiply_dense_tile<DTYPE, kDenseRows, kSome>(product, inputs, padded, row, output + o);
        }
    }
    for (; row < product.rows; ++row) multiply_dense_tile<DTYPE, 1, OUTPUTS>(product, inputs, padded, row, output);
}

// Few rows take one output after the other: memory is read fastest as one stream.
template <Float DTYPE, int ROWS>
AUTOQ_VECTOR void multiply_dense_few(const DenseProduct& product, const float* inputs, int64_t padded, int64_t output) {
    constexpr int64_t kItemBytes = DTYPE == Float::kFloat32 ? 4 : 2;
    const char* weights = static_cast<const char*>(product.weight) + output * product.columns * kItemBytes;
    Lanes sums[ROWS] = {};
    const auto add = [&](int64_t column, int64_t count) __attribute__((always_inline)) {
        const Lanes weight = load_some<DTYPE>(weights, column, count);
        for (int r = 0; r < ROWS; ++r) {
            sums[r] = multiply_add(load<Float::kFloat32>(inputs, r * padded + column), weight, sums[r]);
        }
    };
    int64_t column = 0;
    for (; column + 32 <= product.columns; column += 32) {
        if (weights_ahead_bytes > 0) {
            const char* ahead = weights + column * kItemBytes + weights_ahead_bytes;
            for (int64_t line = 0; line < 32 * kItemBytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        }
        add(column, 16);
        add(column + 16, 16);
    }
    for (; column < product.columns; column += 16) add(column, std::min<int64_t>(16, product.columns - column));
    const float bias = product.bias ? load_float(product.bias, DTYPE, output) : 0.0f;
    for (int r = 0; r < ROWS; ++r) {
        store_float(product.output, DTYPE, r * product.outputs + output, sum_of(sums[r]) + bias);
    }
}

template <Float DTYPE>
void multiply_dense_rows(const DenseProduct& product, int64_t begin, int64_t end) {
    const int64_t padded = (product.columns + 15) / 16 * 16;
    float* inputs = floats_of_thread(static_cast<size_t>(product.rows * padded));
    for (int64_t row = 0; row < product.rows; ++row) {
        for_each_step(product.columns, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            const Lanes values = load_some<DTYPE>(product.input, row * product.columns + column, count);
            store<Float::kFloat32>(inputs, row * padded + column, values);
        });
    }
    int64_t output = begin;
    switch (product.rows) {
        case 1:
            for (; output < end; ++output) multiply_dense_few<DTYPE, 1>(product, inputs, padded, output);
            return;
        case 2:
            for (; output < end; ++output) multiply_dense_few<DTYPE, 2>(product, inputs, padded, output);
            return;
        case 3:
            for (; output < end; ++output) multiply_dense_few<DTYPE, 3>(product, inputs, padded, output);
            return;
    }
    for (; output + kDenseOutputs <= end; output += kDenseOutputs) {
        multiply_dense_outputs<DTYPE, kDenseOutputs>(product, inputs, padded, output);
    }
    for (; output < end; ++output) multiply_dense_outputs<DTYPE, 1>(product, inputs, padded, output);
}

// ---- the table ---------------------------------------------------------------------------------------------------

void norm(const Norm& norm, const void* input, void* output, Float dtype, int64_t columns, int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto kind) { norm_rows<kind()>(norm, input, output, columns, begin, end); });
}

void add(const void* first, const void* second, const void* third, void* output, Float dtype, int64_t begin,
         int64_t end) {
    with_dtype(dtype, [&](auto kind) { add_values<kind()>(first, second, third, output, begin, end); });
}

void activate(ActivationKind activation, bool gated, const void* input, const void* scales, void* output, Float dtype,
              int64_t columns, int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto kind) {
        activate_rows<kind()>(activation, gated, input, scales, output, columns, begin, end);
    });
}

void rotate(const AttentionInput& input, int64_t begin, int64_t end) {
    with_dtype(input.dtype, [&](auto kind) { rotate_tokens<kind()>(input, begin, end); });
}

void rotary_tables(const RotaryTables& tables, int64_t begin, int64_t end) {
    with_dtype(tables.dtype, [&](auto kind) { fill_tables<kind()>(tables, begin, end); });
}

void widen(const CacheView& cache, void* output, Float dtype, int64_t head_dim, int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto kind) { widen_cache<kind()>(cache, output, head_dim, begin, end); });
}

void attend(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first, int64_t tokens) {
    with_dtype(input.dtype, [&](auto kind) { attend_heads<kind()>(input, batch, head, count, first, tokens); });
}

void multiply_dense(const DenseProduct& product, int64_t begin, int64_t end) {
    with_dtype(product.dtype, [&](auto kind) { multiply_dense_rows<kind()>(product, begin, end); });
}

constexpr BlockKernels kernels_of_set = {norm, add, activate, rotate, rotary_tables, widen, attend, multiply_dense};

#undef AUTOQ_EACH_REGISTER
#undef AUTOQ_VECTOR
