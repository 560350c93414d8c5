// Attention, a part of the block's kernels (block_kernels.h); no include guard.
#include "vector.h"

// ---- attention ---------------------------------------------------------------------------------------------------
//
// Softmax in one pass over the positions, a chunk at a time, with a running maximum (Milakov and Gimelshein,
// arXiv:1805.02867): what was summed under an older maximum is scaled down.

constexpr int64_t kChunk = 64;          // positions at most
constexpr int64_t kChunkValues = 4096;  // keys of a chunk in fp32: they stay in the first-level cache
constexpr float kForbidden = -1e30f;
constexpr float kLowest = -1e38f;    // before there is a score
constexpr int64_t kMaxQueries = 16;  // that share a pass over the keys

// Those of a pass are in the order of their tokens: later ones look at as many positions as earlier ones, or at more.
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

// Asks for what is ahead of a row of the cache.
template <Float DTYPE>
AUTOQ_VECTOR void prefetch_ahead(const CacheView& cache, int64_t row, int64_t size) {
    constexpr int64_t kValueBytes = DTYPE == Float::kFloat32 ? 4 : 2;
    const int64_t bytes = cache.scales ? size : size * kValueBytes;
    const char* ahead = static_cast<const char*>(cache.data) + row * bytes + kAheadBytes;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
}

template <Float DTYPE>
AUTOQ_VECTOR void widen_rows(const CacheView& cache, int64_t first, int64_t rows, int64_t size, int64_t padded,
                             float* wide) {
    for (int64_t row = 0; row < rows; ++row) {
        prefetch_ahead<DTYPE>(cache, first + row, size);
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
        store<Float::kFloat32>(scores, position, reduce_each<Sum>(sums));
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
    const int64_t positions = queries[count - 1].positions;
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
// values. The matrices are of words: values, or pairs of them that are neighbours in the dimension summed over.

constexpr int64_t kManyQueries = 64;  // that share a pass over the keys

// A value as fp32.
struct SingleWord {
    static constexpr int64_t kValues = 1;
    static constexpr int64_t kLeastQueries = kMaxQueries + 1;  // from so many on this way is the faster one

    AUTOQ_VECTOR Lanes broadcast(const float* word) { return all_lanes(*word); }
    AUTOQ_VECTOR Lanes add_products(Lanes a, Lanes b, Lanes sums) { return multiply_add(a, b, sums); }

    // Sixteen words of a row of the cache; those behind the row are zero.
    template <Float DTYPE>
    AUTOQ_VECTOR Lanes of_row(const CacheView& cache, int64_t row, int64_t size, int64_t word) {
        return load_cached<DTYPE>(cache, row, size, word, std::min<int64_t>(16, size - word));
    }
    // A word of each of sixteen columns, of kValues rows from `row` on; there are `rows`, the others are zero.
    template <Float DTYPE>
    AUTOQ_VECTOR Lanes of_columns(const CacheView& cache, int64_t row, int64_t /*rows*/, int64_t size, int64_t column) {
        return of_row<DTYPE>(cache, row, size, column);
    }
    // The words of `count` values, a multiple of sixteen; they may take the place of the values.
    AUTOQ_VECTOR void pack(const float* values, int64_t count, float* words) {
        if (words != values) std::copy_n(values, count, words);
    }
};

#ifdef AUTOQ_BF16_PAIRS
// Two values as bf16, the first in the low half.
struct PairWord {
    static constexpr int64_t kValues = 2;
    // Two cost as much either way, on a Zen 4 with 2048 positions in the cache; four take 0.85, eight 0.6 times as
    // long.
    static constexpr int64_t kLeastQueries = 4;

    AUTOQ_VECTOR Lanes broadcast(const float* word) {
        int32_t bits;
        std::memcpy(&bits, word, sizeof bits);
        return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
    }
    AUTOQ_VECTOR Lanes add_products(Lanes a, Lanes b, Lanes sums) {
        return {_mm512_dpbf16_ps(sums.of[0], reinterpret_cast<__m512bh>(a.of[0]), reinterpret_cast<__m512bh>(b.of[0]))};
    }
    // The pairs of 32 values.
    AUTOQ_VECTOR __m512i rounded(Lanes first, Lanes second) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.of[0], first.of[0]));
    }
    template <Float DTYPE>
    AUTOQ_VECTOR Lanes of_row(const CacheView& cache, int64_t row, int64_t size, int64_t word) {
        const int64_t column = 2 * word;
        if (!cache.scales && column + 32 <= size) {
            return {_mm512_loadu_ps(static_cast<const uint16_t*>(cache.data) + row * size + column)};
        }
        const Lanes first = SingleWord::of_row<DTYPE>(cache, row, size, column);
        const Lanes second = column + 16 < size ? SingleWord::of_row<DTYPE>(cache, row, size, column + 16) : Lanes{};
        return {_mm512_castsi512_ps(rounded(first, second))};
    }
    template <Float DTYPE>
    AUTOQ_VECTOR Lanes of_columns(const CacheView& cache, int64_t row, int64_t rows, int64_t size, int64_t column) {
        const Lanes first = SingleWord::of_row<DTYPE>(cache, row, size, column);
        const Lanes second = rows > 1 ? SingleWord::of_row<DTYPE>(cache, row + 1, size, column) : Lanes{};
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i others = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16);
        const __m512i pairs = _mm512_permutexvar_epi16(_mm512_or_si512(lane, others), rounded(first, second));
        return {_mm512_castsi512_ps(pairs)};
    }
    AUTOQ_VECTOR void pack(const float* values, int64_t count, float* words) {
        for (int64_t i = 0; i < count; i += 32) {
            const Lanes first = load<Float::kFloat32>(values, i);
            const Lanes second = i + 16 < count ? load<Float::kFloat32>(values, i + 16) : Lanes{};
            _mm512_storeu_si512(words + i / 2, rounded(first, second));
        }
    }
};

template <Float DTYPE>
using Word = std::conditional_t<DTYPE == Float::kBFloat16, PairWord, SingleWord>;
#else
template <Float>
using Word = SingleWord;
#endif

// Rows and vectors of a product whose sums fit the registers.
constexpr int kProductRows = AUTOQ_LEVEL == 512 ? 4 : 2;
constexpr int kProductVectors = AUTOQ_LEVEL == 512 ? 4 : 2;

// A matrix of words, or of fp32.
struct Matrix {
    float* data;
    int64_t stride;

    Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

// sums[r][c] = sum over i < inner of left[r][i] * right[i][c], for VECTORS * 16 columns; `ADD`: added to what is there.
template <class WORD, bool ADD, int ROWS, int VECTORS>
AUTOQ_VECTOR void multiply_tile(Matrix left, Matrix right, int64_t inner, Matrix sums) {
    Lanes tile[ROWS][VECTORS] = {};
    for (int r = 0; ADD && r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) tile[r][v] = load<Float::kFloat32>(sums.data, r * sums.stride + 16 * v);
    }
    for (int64_t i = 0; i < inner; ++i) {
        Lanes values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = load<Float::kFloat32>(right.data, i * right.stride + 16 * v);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes factor = WORD::broadcast(left.data + r * left.stride + i);
            for (int v = 0; v < VECTORS; ++v) tile[r][v] = WORD::add_products(factor, values[v], tile[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store<Float::kFloat32>(sums.data, r * sums.stride + 16 * v, tile[r][v]);
    }
}

template <class WORD, bool ADD, int VECTORS>
AUTOQ_VECTOR void multiply_columns(Matrix left, int64_t rows, Matrix right, int64_t inner, Matrix sums) {
    int64_t row = 0;
    for (; row + kProductRows <= rows; row += kProductRows) {
        multiply_tile<WORD, ADD, kProductRows, VECTORS>(left.at(row, 0), right, inner, sums.at(row, 0));
    }
    for (; row < rows; ++row) multiply_tile<WORD, ADD, 1, VECTORS>(left.at(row, 0), right, inner, sums.at(row, 0));
}

// `multiply_tile` for any number of rows, and columns that are a multiple of 16.
template <class WORD, bool ADD>
AUTOQ_VECTOR void multiply(Matrix left, int64_t rows, Matrix right, int64_t inner, int64_t columns, Matrix sums) {
    int64_t column = 0;
    for (; column + 16 * kProductVectors <= columns; column += 16 * kProductVectors) {
        multiply_columns<WORD, ADD, kProductVectors>(left, rows, right.at(0, column), inner, sums.at(0, column));
    }
    for (; column < columns; column += 16) {
        multiply_columns<WORD, ADD, 1>(left, rows, right.at(0, column), inner, sums.at(0, column));
    }
}

// Rows of the cache as columns of words.
template <Float DTYPE>
AUTOQ_VECTOR void transpose_rows(const CacheView& cache, int64_t first, int64_t rows, int64_t size, Matrix columns) {
    for (int64_t word = 0; word * Word<DTYPE>::kValues < size; word += 16) {
        for (int64_t row = 0; row < rows; row += 16) {
            Lanes vectors[16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, rows - row); ++i) {
                if (word == 0) prefetch_ahead<DTYPE>(cache, first + row + i, size);
                vectors[i] = Word<DTYPE>::template of_row<DTYPE>(cache, first + row + i, size, word);
            }
            transpose(vectors);
            for (int64_t i = 0; i < 16; ++i) store<Float::kFloat32>(columns.at(word + i, row).data, 0, vectors[i]);
        }
    }
}

// Rows of the cache as rows of words.
template <Float DTYPE>
AUTOQ_VECTOR void pack_rows(const CacheView& cache, int64_t first, int64_t rows, int64_t size, Matrix words) {
    constexpr int64_t kValues = Word<DTYPE>::kValues;
    for (int64_t row = 0; row < rows; row += kValues) {
        for (int64_t i = 0; i < kValues; ++i) prefetch_ahead<DTYPE>(cache, first + row + i, size);
        for (int64_t column = 0; column < size; column += 16) {
            const Lanes some = Word<DTYPE>::template of_columns<DTYPE>(cache, first + row, rows - row, size, column);
            store<Float::kFloat32>(words.at(row / kValues, column).data, 0, some);
        }
    }
}

// Turns the scores of at most sixteen queries with all kChunk positions, -infinity where they do not look, into
// weights, and shrinks their outputs so far.
AUTOQ_VECTOR void weigh_together(Matrix scores, int64_t count, int64_t padded, float* maxima, float* sums,
                                 Matrix outputs) {
    Lanes some[16] = {};
    for (int64_t q = 0; q < count; ++q) {
        some[q] = load<Float::kFloat32>(scores.at(q, 0).data, 0);
        for (int64_t i = 16; i < kChunk; i += 16) {
            some[q] = larger(some[q], load<Float::kFloat32>(scores.at(q, i).data, 0));
        }
    }
    const Lanes before = load<Float::kFloat32>(maxima, 0), maximum = larger(before, reduce_each<Largest>(some));
    const Lanes shrink = exponential(before - maximum);
    store<Float::kFloat32>(maxima, 0, maximum);
    float shrinks[16];
    store<Float::kFloat32>(shrinks, 0, shrink);
    for (int64_t q = 0; q < count; ++q) {
        some[q] = Lanes{};
        for (int64_t i = 0; i < kChunk; i += 16) {
            float* const place = scores.at(q, i).data;
            const Lanes weights = exponential(load<Float::kFloat32>(place, 0) - all_lanes(maxima[q]));
            store<Float::kFloat32>(place, 0, weights);
            some[q] += weights;
        }
        if (shrinks[q] == 1.0f) continue;
        for (int64_t i = 0; i < padded; i += 16) {
            float* const place = outputs.at(q, i).data;
            store<Float::kFloat32>(place, 0, load<Float::kFloat32>(place, 0) * all_lanes(shrinks[q]));
        }
    }
    store<Float::kFloat32>(sums, 0, multiply_add(load<Float::kFloat32>(sums, 0), shrink, reduce_each<Sum>(some)));
}

template <Float DTYPE>
void attend_many_queries(const AttentionInput& input, int64_t batch, Query* queries, int64_t count) {
    constexpr int64_t kValues = Word<DTYPE>::kValues;
    const int64_t size = input.layout.head_dim, padded = input.padded_head_dim();
    const int64_t group = queries[0].head / (input.layout.heads / input.layout.kv_heads);
    const int64_t row = input.keys.row(batch, group, 0);
    const int64_t needed = 2 * kChunk * padded + kManyQueries * (2 * padded + kChunk);
    float* memory = floats_of_thread(static_cast<size_t>(needed));
    const Matrix keys{memory, kChunk};                                  // [words of size][kChunk]
    const Matrix values{keys.data + kChunk * padded, padded};           // [kChunk / kValues][padded]
    const Matrix left{values.data + kChunk * padded, padded};           // the queries, [count][words of size]
    const Matrix outputs{left.data + kManyQueries * padded, padded};    // fp32, [count][padded]
    const Matrix scores{outputs.data + kManyQueries * padded, kChunk};  // fp32, then words of weights, [count][kChunk]
    float maxima[kManyQueries + 16], sums[kManyQueries + 16] = {0};     // sixteen at a time, from any query on
    std::fill(maxima, maxima + kManyQueries + 16, kLowest);
    std::fill(outputs.data, outputs.at(count, 0).data, 0.0f);
    for (int64_t q = 0; q < count; ++q) Word<DTYPE>::pack(queries[q].values, padded, left.at(q, 0).data);
    const int64_t positions = queries[count - 1].positions;
    const bool terms_given = input.mask.data || input.bias.data;
    alignas(64) float terms[kChunk];
    bool looks[kManyQueries + 1] = {false};
    int64_t begin = 0;  // the first query that looks at this chunk or a later one
    for (int64_t first = 0; first < positions; first += kChunk) {
        const int64_t rows = std::min(positions - first, kChunk);
        while (queries[begin].positions <= first) ++begin;
        transpose_rows<DTYPE>(input.keys, row + first, rows, size, keys);
        pack_rows<DTYPE>(input.values, row + first, rows, size, values);
        multiply<Word<DTYPE>, false>(left.at(begin, 0), count - begin, keys, (size + kValues - 1) / kValues, kChunk,
                                     scores.at(begin, 0));
        for (int64_t q = begin; q < count; ++q) {
            float* of_query = scores.at(q, 0).data;
            int64_t visible = std::min(queries[q].positions - first, rows);
            if (terms_given) {
                if (!gather_terms(input, batch, queries[q], first, visible, terms)) visible = 0;
                for (int64_t i = 0; i < kChunk; ++i) of_query[i] += terms[i];
            }
            std::fill(of_query + visible, of_query + kChunk, -INFINITY);
            looks[q] = visible > 0;
        }
        for (int64_t q = begin; q < count; q += 16) {
            weigh_together(scores.at(q, 0), std::min<int64_t>(16, count - q), padded, maxima + q, sums + q,
                           outputs.at(q, 0));
        }
        // Queries that do not look at the chunk at all are left out: what it holds may be no number.
        for (int64_t q = begin, end; q < count; q = end + 1) {
            for (end = q; looks[end]; ++end) {
                Word<DTYPE>::pack(scores.at(end, 0).data, kChunk, scores.at(end, 0).data);
            }
            multiply<Word<DTYPE>, true>(scores.at(q, 0), end - q, values, (rows + kValues - 1) / kValues, padded,
                                        outputs.at(q, 0));
        }
    }
    for (int64_t q = 0; q < count; ++q) queries[q].sum = sums[q];
    store_attended<DTYPE>(input, batch, queries, count, outputs.data);
}

// ---- attention of heads ---------------------------------------------------------------------------------------------

template <Float DTYPE>
void attend_heads(const AttentionInput& input, int64_t batch, int64_t head, int64_t count, int64_t first,
                  int64_t tokens) {
    // Not by what this call is given of them, which depends on the number of threads.
    const bool many = input.tokens * (input.layout.heads / input.layout.kv_heads) >= Word<DTYPE>::kLeastQueries;
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
            queries[filled++] = {values, h, token, positions, kLowest, 0.0f};
            if (filled == together) {
                attend(input, batch, queries, filled);
                filled = 0;
            }
        }
    }
    if (filled > 0) attend(input, batch, queries, filled);
}
