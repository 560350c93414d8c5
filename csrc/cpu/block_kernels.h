// The block's kernels in one source for every instruction set. Included by block_kernels.cpp, once for each, inside its
// namespace and its target region; no include guard.
#include "vector.h"

// Values are read and written in steps of a register; the last step of a row may be a part of one.
template <class Step>
AUTOQ_VECTOR void for_each_step(int64_t columns, Step&& step) {
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) step(column, 16);
    if (column < columns) step(column, columns - column);
}

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

// ---- attention ---------------------------------------------------------------------------------------------------
//
// Softmax in one pass over the positions, a chunk at a time, with a running maximum (Milakov and Gimelshein,
// arXiv:1805.02867): what was summed under an older maximum is scaled down.

constexpr int64_t kChunk = 64;          // positions at most
constexpr int64_t kChunkValues = 4096;  // keys of a chunk in fp32: they stay in the first-level cache
constexpr float kForbidden = -1e30f;
constexpr int64_t kMaxQueries = 16;  // that share a pass over the keys

struct Query {
    const float* values;
    int64_t head, token;
    int64_t positions;  // that it may look at, from the first on, unless the mask forbids one
    float maximum, sum;
};

// Adds a term to the scores of one query with the positions [first, first + count).
AUTOQ_VECTOR void add_term(const ScoreTerm& term, int64_t batch, const Query& query, int64_t first, int64_t count,
                           float* scores) {
    if (!term.data) return;
    const int64_t start = batch * term.batch_stride + query.head * term.head_stride + query.token * term.token_stride +
                          first * term.position_stride;
    const int64_t stride = term.position_stride;
    if (term.is_boolean) {
        const uint8_t* bytes = static_cast<const uint8_t*>(term.data) + start;
        for (int64_t i = 0; i < count; ++i) scores[i] += bytes[i * stride] == term.forbidden ? kForbidden : 0.0f;
    } else if (term.dtype == Float::kFloat32) {
        const float* values = static_cast<const float*>(term.data) + start;
        for (int64_t i = 0; i < count; ++i) scores[i] += values[i * stride];
    } else {
        for (int64_t i = 0; i < count; ++i) scores[i] += load_float(term.data, term.dtype, start + i * stride);
    }
}

// What is added to the scores of a query with the positions [first, first + count); whether it may look at any of them.
AUTOQ_VECTOR bool gather_terms(const AttentionInput& input, int64_t batch, const Query& query, int64_t first,
                               int64_t count, float* terms) {
    for (int64_t i = 0; i < kChunk; ++i) terms[i] = 0.0f;
    add_term(input.mask, batch, query, first, count, terms);
    float largest = kForbidden;
    for (int64_t i = 0; i < count; ++i) largest = terms[i] > largest ? terms[i] : largest;
    add_term(input.bias, batch, query, first, count, terms);
    return largest > kForbidden;
}

// Sixteen values of a row of the cache, or the last of it.
template <Float DTYPE>
AUTOQ_VECTOR Lanes load_cached(const CacheView& cache, int64_t row, int64_t size, int64_t column, int64_t count) {
    if (!cache.scales) return load_some<DTYPE>(cache.data, row * size + column, count);
    int8_t bytes[16] = {0};
    std::memcpy(bytes, static_cast<const int8_t*>(cache.data) + row * size + column, static_cast<size_t>(count));
    return load_bytes(bytes) * all_lanes(cache.scales[row]);
}

template <Float DTYPE>
AUTOQ_VECTOR void widen_rows(const CacheView& cache, int64_t first, int64_t rows, int64_t size, int64_t padded,
                             float* wide) {
    for (int64_t row = 0; row < rows; ++row) {
        for_each_step(size, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            const Lanes values = load_cached<DTYPE>(cache, first + row, size, column, count);
            store<Float::kFloat32>(wide, row * padded + column, values);
        });
    }
}

template <Float DTYPE>
void widen_cache(const CacheView& cache, void* output, int64_t size, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        for_each_step(size, [&](int64_t column, int64_t count) __attribute__((always_inline)) {
            store_some<DTYPE>(output, row * size + column, count, load_cached<DTYPE>(cache, row, size, column, count));
        });
    }
}

// So many vectors of sums do registers hold.
constexpr int kTogether = AUTOQ_LEVEL == 512 ? 16 : 4;

// Scores of one query with `count` keys, whose rows are there for a multiple of sixteen.
AUTOQ_VECTOR void score_chunk(const float* query, const float* keys, int64_t count, int64_t padded, float* scores) {
    for (int64_t position = 0; position < count; position += 16) {
        Lanes sums[16];
        for (int first = 0; first < 16; first += kTogether) {
            Lanes some[kTogether] = {};
            for (int64_t column = 0; column < padded; column += 16) {
                const Lanes value = load<Float::kFloat32>(query, column);
                for (int i = 0; i < kTogether; ++i) {
                    const int64_t key = (position + first + i) * padded;
                    some[i] = multiply_add(value, load<Float::kFloat32>(keys, key + column), some[i]);
                }
            }
            for (int i = 0; i < kTogether; ++i) sums[first + i] = some[i];
        }
        store<Float::kFloat32>(scores, position, sums_of(sums));
    }
}

// Turns scores into weights under the query's maximum so far; returns by how much older sums shrink.
AUTOQ_VECTOR float weigh_chunk(Query& query, int64_t count, float* scores) {
    Lanes largest = all_lanes(query.maximum);
    for (int64_t i = count; i % 16 != 0; ++i) scores[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += 16) largest = larger(largest, load<Float::kFloat32>(scores, i));
    const float maximum = largest_of(largest);
    Lanes sum{};
    for (int64_t i = 0; i < count; i += 16) {
        const Lanes weight = exponential(load<Float::kFloat32>(scores, i) - all_lanes(maximum));
        store<Float::kFloat32>(scores, i, weight);
        sum += weight;
    }
    const float shrink = query.maximum == maximum ? 1.0f : std::exp(query.maximum - maximum);
    query.sum = query.sum * shrink + sum_of(sum);
    query.maximum = maximum;
    return shrink;
}

// output = output * shrink + weights * values
AUTOQ_VECTOR void add_values_of_chunk(const float* weights, const float* values, int64_t count, int64_t padded,
                                      float shrink, float* output) {
    for (int64_t column = 0; column < padded; column += 64) {
        const int64_t steps = padded - column < 64 ? (padded - column) / 16 : 4;
        Lanes sums[4] = {};
        for (int64_t i = 0; i < steps; ++i) {
            sums[i] = load<Float::kFloat32>(output, column + 16 * i) * all_lanes(shrink);
        }
        if (steps == 4) {
            for (int64_t position = 0; position < count; ++position) {
                const Lanes weight = all_lanes(weights[position]);
                for (int i = 0; i < 4; ++i) {
                    const Lanes value = load<Float::kFloat32>(values, position * padded + column + 16 * i);
                    sums[i] = multiply_add(weight, value, sums[i]);
                }
            }
        } else {
            for (int64_t position = 0; position < count; ++position) {
                const Lanes weight = all_lanes(weights[position]);
                for (int64_t i = 0; i < steps; ++i) {
                    const Lanes value = load<Float::kFloat32>(values, position * padded + column + 16 * i);
                    sums[i] = multiply_add(weight, value, sums[i]);
                }
            }
        }
        for (int64_t i = 0; i < steps; ++i) store<Float::kFloat32>(output, column + 16 * i, sums[i]);
    }
}

template <Float DTYPE>
AUTOQ_VECTOR void store_attended(const AttentionInput& input, int64_t batch, const Query* queries, int64_t count,
                                 const float* outputs) {
    const int64_t size = input.layout.head_dim, padded = input.padded_head_dim();
    for (int64_t q = 0; q < count; ++q) {
        const Query& query = queries[q];
        const int64_t to =
            ((batch * input.tokens + query.token) * input.layout.heads + query.head) * input.layout.head_dim;
        for_each_step(size, [&](int64_t column, int64_t step) __attribute__((always_inline)) {
            // A query that may look nowhere (padding) gets zeros.
            const float inverse = query.sum > 0.0f ? 1.0f / query.sum : 0.0f;
            const Lanes value = load<Float::kFloat32>(outputs, q * padded + column) * all_lanes(inverse);
            store_some<DTYPE>(input.output, to + column, step, value);
        });
    }
}

template <Float DTYPE>
void attend_queries(const AttentionInput& input, int64_t batch, Query* queries, int64_t count) {
    const int64_t size = input.layout.head_dim, padded = input.padded_head_dim();
    const int64_t group = queries[0].head / (input.layout.heads / input.layout.kv_heads);
    const int64_t row = input.keys.row(batch, group, 0);
    const int64_t needed = (2 * kChunk + kMaxQueries) * padded;
    float* wide_keys = floats_of_thread(static_cast<size_t>(needed));
    float* wide_values = wide_keys + kChunk * padded;
    float* outputs = wide_values + kChunk * padded;
    std::fill(wide_keys, wide_keys + needed, 0.0f);
    int64_t positions = 0;
    for (int64_t q = 0; q < count; ++q) {
        if (queries[q].positions > positions) positions = queries[q].positions;
    }
    const bool terms_given = input.mask.data || input.bias.data;
    alignas(64) float scores[kChunk] = {0}, terms[kChunk];
    const int64_t chunk = std::clamp<int64_t>(kChunkValues / padded / 16 * 16, 16, kChunk);
    for (int64_t first = 0; first < positions; first += chunk) {
        const int64_t rows = std::min(positions - first, chunk);
        widen_rows<DTYPE>(input.keys, row + first, rows, size, padded, wide_keys);
        widen_rows<DTYPE>(input.values, row + first, rows, size, padded, wide_values);
        for (int64_t q = 0; q < count; ++q) {
            Query& query = queries[q];
            const int64_t visible = query.positions - first < rows ? query.positions - first : rows;
            if (visible <= 0) continue;
            if (terms_given && !gather_terms(input, batch, query, first, visible, terms)) continue;
            score_chunk(query.values, wide_keys, visible, padded, scores);
            if (terms_given) {
                for (int64_t i = 0; i < kChunk; ++i) scores[i] += terms[i];
            }
            const float shrink = weigh_chunk(query, visible, scores);
            add_values_of_chunk(scores, wide_values, visible, padded, shrink, outputs + q * padded);
        }
    }
    store_attended<DTYPE>(input, batch, queries, count, outputs);
}

// ---- attention of many queries -------------------------------------------------------------------------------------
//
// The same, as two products of matrices for each chunk: of many queries with the keys, and of their weights with the
// values.

constexpr int64_t kManyQueries = 64;  // that share a pass over the keys

// Rows and vectors of a product whose sums fit the registers.
constexpr int kProductRows = AUTOQ_LEVEL == 512 ? 4 : 2;
constexpr int kProductVectors = AUTOQ_LEVEL == 512 ? 4 : 2;

// sums[r][c] += sum over i < inner of left[r][i] * right[i][c], for VECTORS * 16 columns.
template <int ROWS, int VECTORS>
AUTOQ_VECTOR void add_product_tile(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                                   int64_t inner, float* sums, int64_t stride) {
    Lanes tile[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) tile[r][v] = load<Float::kFloat32>(sums, r * stride + 16 * v);
    }
    for (int64_t i = 0; i < inner; ++i) {
        Lanes values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = load<Float::kFloat32>(right, i * right_stride + 16 * v);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes factor = all_lanes(left[r * left_stride + i]);
            for (int v = 0; v < VECTORS; ++v) tile[r][v] = multiply_add(factor, values[v], tile[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store<Float::kFloat32>(sums, r * stride + 16 * v, tile[r][v]);
    }
}

template <int VECTORS>
AUTOQ_VECTOR void add_product_columns(const float* left, int64_t left_stride, int64_t rows, const float* right,
                                      int64_t right_stride, int64_t inner, float* sums, int64_t stride) {
    int64_t row = 0;
    for (; row + kProductRows <= rows; row += kProductRows) {
        add_product_tile<kProductRows, VECTORS>(left + row * left_stride, left_stride, right, right_stride, inner,
                                                sums + row * stride, stride);
    }
    for (; row < rows; ++row) {
        add_product_tile<1, VECTORS>(left + row * left_stride, left_stride, right, right_stride, inner,
                                     sums + row * stride, stride);
    }
}

// The same for any number of rows, and columns that are a multiple of 16.
AUTOQ_VECTOR void add_product(const float* left, int64_t left_stride, int64_t rows, const float* right,
                              int64_t right_stride, int64_t inner, int64_t columns, float* sums, int64_t stride) {
    int64_t column = 0;
    for (; column + 16 * kProductVectors <= columns; column += 16 * kProductVectors) {
        add_product_columns<kProductVectors>(left, left_stride, rows, right + column, right_stride, inner,
                                             sums + column, stride);
    }
    for (; column < columns; column += 16) {
        add_product_columns<1>(left, left_stride, rows, right + column, right_stride, inner, sums + column, stride);
    }
}

// Rows of the cache as columns, [padded][kChunk].
template <Float DTYPE>
AUTOQ_VECTOR void widen_transposed(const CacheView& cache, int64_t first, int64_t rows, int64_t size, float* wide) {
    for (int64_t column = 0; column < size; column += 16) {
        const int64_t count = std::min<int64_t>(16, size - column);
        for (int64_t row = 0; row < rows; row += 16) {
            Lanes vectors[16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, rows - row); ++i) {
                vectors[i] = load_cached<DTYPE>(cache, first + row + i, size, column, count);
            }
            transpose(vectors);
            for (int64_t i = 0; i < 16; ++i) {
                store<Float::kFloat32>(wide, (column + i) * kChunk + row, vectors[i]);
            }
        }
    }
}

// Turns scores into weights, those of positions from `visible` on into zeros; the outputs so far shrink.
AUTOQ_VECTOR void weigh_and_shrink(Query& query, int64_t visible, int64_t padded, float* scores, float* output) {
    for (int64_t i = visible; i < kChunk; ++i) scores[i] = -INFINITY;
    const float shrink = weigh_chunk(query, kChunk, scores);
    if (shrink == 1.0f) return;
    for (int64_t column = 0; column < padded; column += 16) {
        store<Float::kFloat32>(output, column, load<Float::kFloat32>(output, column) * all_lanes(shrink));
    }
}

template <Float DTYPE>
void attend_many_queries(const AttentionInput& input, int64_t batch, Query* queries, int64_t count) {
    const int64_t size = input.layout.head_dim, padded = input.padded_head_dim();
    const int64_t group = queries[0].head / (input.layout.heads / input.layout.kv_heads);
    const int64_t row = input.keys.row(batch, group, 0);
    const int64_t needed = 2 * kChunk * padded + kManyQueries * (2 * padded + kChunk);
    float* keys = floats_of_thread(static_cast<size_t>(needed));  // [padded][kChunk]
    float* values = keys + kChunk * padded;                       // [kChunk][padded]
    float* left = values + kChunk * padded;                       // the queries, [count][padded]
    float* outputs = left + kManyQueries * padded;                // [count][padded]
    float* scores = outputs + kManyQueries * padded;              // [count][kChunk]
    std::fill(keys, keys + needed, 0.0f);
    int64_t positions = 0;
    for (int64_t q = 0; q < count; ++q) {
        positions = std::max(positions, queries[q].positions);
        std::copy_n(queries[q].values, padded, left + q * padded);
    }
    const bool terms_given = input.mask.data || input.bias.data;
    alignas(64) float terms[kChunk];
    int64_t begin = 0;  // the first query that looks at the chunk: later tokens see as much as earlier ones
    for (int64_t first = 0; first < positions; first += kChunk) {
        const int64_t rows = std::min(positions - first, kChunk);
        while (queries[begin].positions <= first) ++begin;
        widen_transposed<DTYPE>(input.keys, row + first, rows, size, keys);
        widen_rows<DTYPE>(input.values, row + first, rows, size, padded, values);
        std::fill(scores + begin * kChunk, scores + count * kChunk, 0.0f);
        add_product(left + begin * padded, padded, count - begin, keys, kChunk, size, kChunk, scores + begin * kChunk,
                    kChunk);
        for (int64_t q = begin; q < count; ++q) {
            float* of_query = scores + q * kChunk;
            const int64_t visible = std::min(queries[q].positions - first, rows);
            if (terms_given && !gather_terms(input, batch, queries[q], first, visible, terms)) {
                std::fill(of_query, of_query + kChunk, 0.0f);
                continue;
            }
            for (int64_t i = 0; terms_given && i < kChunk; ++i) of_query[i] += terms[i];
            weigh_and_shrink(queries[q], visible, padded, of_query, outputs + q * padded);
        }
        add_product(scores + begin * kChunk, kChunk, count - begin, values, padded, rows, padded,
                    outputs + begin * padded, padded);
    }
    store_attended<DTYPE>(input, batch, queries, count, outputs);
}

// ---- attention of heads ---------------------------------------------------------------------------------------------

template <Float DTYPE>
void attend_heads(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first,
                  int64_t tokens) {
    // Not by what this call is given of them, which depends on the number of threads.
    const bool many = input.tokens > 1 && input.tokens * (input.layout.heads / input.layout.kv_heads) > kMaxQueries;
    const int64_t together = many ? kManyQueries : kMaxQueries;
    const auto attend = many ? attend_many_queries<DTYPE> : attend_queries<DTYPE>;
    Query queries[kManyQueries];
    int64_t filled = 0;
    for (int64_t token = first; token < first + tokens; ++token) {
        for (int64_t h = head; h < head + count; ++h) {
            const float* values =
                input.queries + ((batch * input.tokens + token) * input.layout.heads + h) * input.padded_head_dim();
            // A mask says all that a query may look at; without one it may look back.
            const int64_t positions = input.past + (input.mask.data ? input.tokens : token + 1);
            queries[filled++] = {values, h, token, positions, -1e38f, 0.0f};
            if (filled == together) {
                attend(input, batch, queries, filled);
                filled = 0;
            }
        }
    }
    if (filled > 0) attend(input, batch, queries, filled);
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
    constexpr int64_t kItemBytes = DTYPE == Float::kFloat32 ? 4 : 2, kAhead = 8192;
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
        const char* ahead = weights + column * kItemBytes + kAhead;
        for (int64_t line = 0; line < 32 * kItemBytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
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

void widen(const CacheView& cache, void* output, Float dtype, int64_t head_dim, int64_t begin, int64_t end) {
    with_dtype(dtype, [&](auto kind) { widen_cache<kind()>(cache, output, head_dim, begin, end); });
}

void attend(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first, int64_t tokens) {
    with_dtype(input.dtype, [&](auto kind) { attend_heads<kind()>(input, batch, head, count, first, tokens); });
}

void multiply_dense(const DenseProduct& product, int64_t begin, int64_t end) {
    with_dtype(product.dtype, [&](auto kind) { multiply_dense_rows<kind()>(product, begin, end); });
}

constexpr BlockKernels kernels_of_set = {norm, add, activate, rotate, widen, attend, multiply_dense};

#undef AUTOQ_EACH_REGISTER
#undef AUTOQ_VECTOR
