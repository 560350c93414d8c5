// Attention for few tokens: its time is that of reading the caches.
//
// The positions are cut into parts, and each block goes over one part for one key head and up to eight of the queries
// that share it; a second kernel puts the parts together (Dao et al., flash-decoding). Within a block, each warp takes
// several positions at a time, each of them by a team of lanes that hold the head's columns, 16 bytes or so each:
//
//   warp 0:  lanes 0-15 position 0, lanes 16-31 position 1   (128 columns of 16 bits)
//   warp 1:  lanes 0-15 position 2, ...
//
// A lane keeps its columns of the queries and of the weighted sums of values in registers, under a running maximum of
// the scores (Milakov and Gimelshein, arXiv:1805.02867). Teams, warps and parts are then merged in that order.
#include <algorithm>

#include "block.h"
#include "heads.h"
#include "overlap.h"

namespace autoq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;            // positions of a team whose keys and values are on their way together
constexpr int kFewestPositions = 64;  // of a part: below that, putting parts together costs more than they save
constexpr int kMostParts = 128;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr float kLowest = -1e38f;  // the maximum of no scores

// Where the parts leave what they found, where there are several: the sums [rows][parts][head_dim], then the maximum of
// the scores and the sum of the weights [rows][parts][2]. Rows are the queries, those of a key head together.
struct Parts {
    int count;
    float* sums;
    float* totals;
};

struct Range {
    int64_t held, seen;  // positions in the caches before and with the new tokens
    int64_t size;        // of a part
    int64_t begin, end;  // of this one
};

__device__ inline Range range_of(const AttentionInput& input, int parts, int part) {
    Range range;
    range.held = positions_held(input);
    range.seen = range.held + input.tokens;
    range.size = ((range.seen + parts - 1) / parts + 15) / 16 * 16;
    range.begin = part * range.size;
    range.end = range.begin + range.size < range.seen ? range.begin + range.size : range.seen;
    return range;
}

__device__ inline int64_t queries_per_key_head(const AttentionInput& input) {
    return input.layout.heads / input.layout.kv_heads * input.tokens;
}

// A query that shares a key head: all heads of the first token, then of the next.
struct Row {
    int token, head;
};

__device__ inline Row row_of(const AttentionInput& input, int64_t group, int64_t row) {
    const int shared = static_cast<int>(input.layout.heads) / static_cast<int>(input.layout.kv_heads);
    const int index = static_cast<int>(row);
    return {index / shared, static_cast<int>(group) * shared + index % shared};
}

// The weighted mean from sums under a maximum; zeros for a query that may look nowhere, which only padding may do.
__device__ inline float mean_of(float sum, float maximum, float total) {
    const bool nowhere = maximum < kForbidden / 2 && total == total;  // NaN stays
    return nowhere ? 0.0f : sum / total;
}

__device__ inline void write_output(const AttentionInput& input, int64_t batch, Row row, int64_t column, float value) {
    const int64_t head = (batch * input.tokens + row.token) * input.layout.heads + row.head;
    write_value(input.output, input.dtype, head * input.layout.head_dim + column, value);
}

// ---- one part ----------------------------------------------------------------------------------------------------

// What is known of ROWS queries after some positions, of the columns that a lane holds.
template <int ROWS, int COLUMNS>
struct Found {
    float maximum[ROWS], total[ROWS], sums[ROWS][COLUMNS];

    __device__ void start() {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            maximum[row] = kLowest;
            total[row] = 0.0f;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) sums[row][column] = 0.0f;
        }
    }

    // Adds what the lane `distance` further knows.
    __device__ void merge_lanes(int distance) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const float other = shuffle_xor(maximum[row], distance);
            const float larger = fmaxf(maximum[row], other);
            const float factor = exp_of(maximum[row] - larger), other_factor = exp_of(other - larger);
            maximum[row] = larger;
            total[row] = total[row] * factor + shuffle_xor(total[row], distance) * other_factor;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const float more = shuffle_xor(sums[row][column], distance);
                sums[row][column] = sums[row][column] * factor + more * other_factor;
            }
        }
    }
};

// A team's positions at a time: keys, values, their scales and the scores.
//
// C, WIDE, PACKS: a lane holds PACKS accesses of WIDE values of the cache's type.
template <typename C, int WIDE, int ROWS, int PACKS>
struct Team {
    const AttentionInput& input;
    Range range;
    int64_t batch, group, first_row;
    int lanes, member;
    float queries[ROWS][PACKS * WIDE];
    Found<ROWS, PACKS * WIDE> found;

    __device__ int column(int pack) const { return (pack * lanes + member) * WIDE; }

    __device__ Pack<C, WIDE> load(const CacheView& cache, int64_t position, int pack) const {
        if (position >= range.end || column(pack) >= input.layout.head_dim) return {};
        const int64_t row = cache.row(batch, group, position);
        const C* from = static_cast<const C*>(cache.data) + row * input.layout.head_dim + column(pack);
        return load_pack<C, WIDE>(from);
    }

    __device__ float scale(const CacheView& cache, int64_t position) const {
        if (sizeof(C) > 1 || position >= range.end) return 1.0f;
        return load_value<float>(cache.scales + cache.row(batch, group, position));
    }

    // A mask says all that a query may look at; without one it may look back.
    __device__ float with_terms(float score, Row query, int64_t position) const {
        if (position >= range.end || query.token >= input.tokens) return -INFINITY;
        if (!input.mask.data && position > range.held + query.token) return -INFINITY;
        return score + term_at(input.mask, batch, query.head, query.token, position) +
               term_at(input.bias, batch, query.head, query.token, position);
    }

    // The team's next positions: `first`, and kUnroll - 1 more, each `step` further.
    __device__ void add(int64_t first, int step) {
        Pack<C, WIDE> keys[kUnroll][PACKS], values[kUnroll][PACKS];
        float key_scales[kUnroll], value_scales[kUnroll], scores[ROWS][kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
            for (int pack = 0; pack < PACKS; ++pack) {
                keys[i][pack] = load(input.keys, first + i * step, pack);
                values[i][pack] = load(input.values, first + i * step, pack);
            }
            key_scales[i] = scale(input.keys, first + i * step);
            value_scales[i] = scale(input.values, first + i * step);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) scores[row][i] = score(keys[i], row) * key_scales[i];
        }
        const bool terms = input.mask.data || input.bias.data || input.tokens > 1 || first + kUnroll * step > range.end;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (terms) {
                const Row query = row_of(input, group, first_row + row);
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) scores[row][i] = with_terms(scores[row][i], query, first + i * step);
            }
            weigh(scores[row], row);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) add_values(values[i], scores[row][i] * value_scales[i], row);
        }
    }

    __device__ float score(const Pack<C, WIDE> (&keys)[PACKS], int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int pack = 0; pack < PACKS; ++pack) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) sum += queries[row][pack * WIDE + i] * to_float(keys[pack].values[i]);
        }
        return sum_of_lanes(sum, lanes);
    }

    // Turns scores into weights under the row's maximum so far.
    __device__ void weigh(float (&scores)[kUnroll], int row) {
        float larger = found.maximum[row];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) larger = fmaxf(larger, scores[i]);
        const float factor = exp_of(found.maximum[row] - larger);
        found.maximum[row] = larger;
        found.total[row] *= factor;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            scores[i] = exp_of(scores[i] - larger);
            found.total[row] += scores[i];
        }
#pragma unroll
        for (int column = 0; column < PACKS * WIDE; ++column) found.sums[row][column] *= factor;
    }

    __device__ void add_values(const Pack<C, WIDE> (&values)[PACKS], float weight, int row) {
#pragma unroll
        for (int pack = 0; pack < PACKS; ++pack) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i)
                found.sums[row][pack * WIDE + i] += weight * to_float(values[pack].values[i]);
        }
    }
};

// What a block keeps in shared memory, in floats: the queries, and in place of them what each warp found.
__host__ __device__ constexpr int shared_floats(int rows, int size) {
    return kWarps * rows * (size + 2) + kWarps * size;
}

// The new tokens' keys and values whose positions are in the block's part, each by a warp.
template <typename C>
__device__ void write_new(const AttentionInput& input, const Range& range, int64_t batch, int64_t group,
                          float* scratch) {
    const int64_t from = range.begin > range.held ? range.begin : range.held;
    for (int64_t i = threadIdx.x / kWarp; i < 2 * (range.end - from); i += kWarps) {
        const int64_t position = from + i / 2;
        cache_head<C>(input, i % 2 == 0, batch, group, position - range.held, position, scratch);
    }
}

template <int ROWS>
__device__ void read_queries(const AttentionInput& input, int64_t batch, int64_t group, int64_t first_row,
                             float* queries) {
    const int size = static_cast<int>(input.layout.head_dim);
    for (int row = threadIdx.x / kWarp; row < ROWS; row += kWarps) {
        const Row query = row_of(input, group, first_row + row);
        float* head = queries + row * size;
        if (query.token < input.tokens) {
            read_head(input, input.query_norm.weight, true, batch, query.token, input.layout.query(query.head), head);
        } else {
            for (int i = threadIdx.x % kWarp; i < size; i += kWarp) head[i] = 0.0f;
        }
    }
}

// Puts together what the warps found, and leaves it for the other parts or as the result.
template <int ROWS>
__device__ void finish(const AttentionInput& input, const Parts& parts, int64_t batch, int64_t group, int64_t first_row,
                       const float* sums, const float* totals) {
    const int size = static_cast<int>(input.layout.head_dim);
    for (int i = threadIdx.x; i < ROWS * size; i += kThreads) {
        const int row = i / size, column = i % size;
        const Row query = row_of(input, group, first_row + row);
        if (query.token >= input.tokens) continue;
        float maximum = kLowest, total = 0.0f, sum = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) maximum = fmaxf(maximum, totals[(warp * ROWS + row) * 2]);
        for (int warp = 0; warp < kWarps; ++warp) {
            const float factor = exp_of(totals[(warp * ROWS + row) * 2] - maximum);
            total += totals[(warp * ROWS + row) * 2 + 1] * factor;
            sum += sums[(warp * ROWS + row) * size + column] * factor;
        }
        if (parts.count == 1) {
            write_output(input, batch, query, column, mean_of(sum, maximum, total));
            continue;
        }
        const int64_t all = queries_per_key_head(input);
        const int64_t at = ((batch * input.layout.kv_heads + group) * all + first_row + row) * parts.count + blockIdx.x;
        store_global(parts.sums + at * size + column, sum);
        if (column == 0) {
            store_global(parts.totals + 2 * at, maximum);
            store_global(parts.totals + 2 * at + 1, total);
        }
    }
}

// Blocks that a multiprocessor has room for, by their registers: enough for the memory to be busy.
constexpr int blocks_at_once(int rows, int packs) { return packs > 1 || rows > 4 ? 1 : 3; }

template <typename C, int WIDE, int ROWS, int PACKS>
__global__ void __launch_bounds__(kThreads, blocks_at_once(ROWS, PACKS))
    attend_kernel(AttentionInput input, Parts parts) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int size = static_cast<int>(input.layout.head_dim);
    const int64_t chunks = (queries_per_key_head(input) + ROWS - 1) / ROWS;
    const int64_t batch = blockIdx.z, group = blockIdx.y / chunks, first_row = blockIdx.y % chunks * ROWS;
    const Range range = range_of(input, parts.count, static_cast<int>(blockIdx.x));
    if (range.begin >= range.end) return;
    auto* sums = reinterpret_cast<float*>(shared_memory());
    float* totals = sums + kWarps * ROWS * size;
    float* scratch = totals + 2 * kWarps * ROWS + threadIdx.x / kWarp * size;
    write_new<C>(input, range, batch, group, scratch);
    read_queries<ROWS>(input, batch, group, first_row, sums);
    sync_threads();  // the new keys and values too are then seen by all of the block

    int lanes = 1;
    while (lanes * PACKS * WIDE < size) lanes *= 2;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Team<C, WIDE, ROWS, PACKS> team{input, range, batch, group, first_row, lanes, lane % lanes, {}, {}};
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
        for (int i = 0; i < PACKS * WIDE; ++i) {
            const int column = team.column(i / WIDE) + i % WIDE;
            team.queries[row][i] = column < size ? sums[row * size + column] * input.scale : 0.0f;
        }
    }
    sync_threads();  // before the queries' place is taken
    team.found.start();
    const int teams = kThreads / lanes, index = static_cast<int>(threadIdx.x) / lanes;
    for (int64_t first = range.begin; first < range.end; first += teams * kUnroll) team.add(first + index, teams);
    for (int distance = lanes; distance < kWarp; distance *= 2) team.found.merge_lanes(distance);
    if (lane < lanes) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (lane == 0) {
                totals[(warp * ROWS + row) * 2] = team.found.maximum[row];
                totals[(warp * ROWS + row) * 2 + 1] = team.found.total[row];
            }
#pragma unroll
            for (int i = 0; i < PACKS * WIDE; ++i) {
                const int column = team.column(i / WIDE) + i % WIDE;
                if (column < size) sums[(warp * ROWS + row) * size + column] = team.found.sums[row][i];
            }
        }
    }
    sync_threads();
    finish<ROWS>(input, parts, batch, group, first_row, sums, totals);
}

// ---- all parts ---------------------------------------------------------------------------------------------------

// A block for each query.
__global__ void __launch_bounds__(kThreads) merge_kernel(AttentionInput input, Parts parts) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const Range range = range_of(input, parts.count, 0);
    const int used = static_cast<int>((range.seen + range.size - 1) / range.size);
    const int size = static_cast<int>(input.layout.head_dim);
    const int64_t all = queries_per_key_head(input), first = static_cast<int64_t>(blockIdx.x) * parts.count;
    const int64_t group = blockIdx.x / all % input.layout.kv_heads, batch = blockIdx.x / all / input.layout.kv_heads;
    float maximum = kLowest;
    for (int part = 0; part < used; ++part)
        maximum = fmaxf(maximum, load_value<float>(parts.totals + 2 * (first + part)));
    for (int column = threadIdx.x; column < size; column += kThreads) {
        float total = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (int part = 0; part < used; ++part) {
            const float factor = exp_of(load_value<float>(parts.totals + 2 * (first + part)) - maximum);
            total += load_value<float>(parts.totals + 2 * (first + part) + 1) * factor;
            sum += load_value<float>(parts.sums + (first + part) * size + column) * factor;
        }
        write_output(input, batch, row_of(input, group, blockIdx.x % all), column, mean_of(sum, maximum, total));
    }
}

// ---- for torch's attention ---------------------------------------------------------------------------------------

// A block for each token.
template <typename C>
__global__ void __launch_bounds__(kThreads) rotate_kernel(AttentionInput input, void* queries) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int size = static_cast<int>(input.layout.head_dim), warp = threadIdx.x / kWarp;
    float* head = reinterpret_cast<float*>(shared_memory()) + warp * size;
    const int64_t batch = blockIdx.x / input.tokens, token = blockIdx.x % input.tokens;
    const int64_t position = positions_held(input) + token, heads = input.layout.heads;
    for (int64_t i = warp; i < heads + 2 * input.layout.kv_heads; i += kWarps) {
        if (i >= heads) {
            cache_head<C>(input, (i - heads) % 2 == 0, batch, (i - heads) / 2, token, position, head);
            continue;
        }
        read_head(input, input.query_norm.weight, true, batch, token, input.layout.query(i), head);
        for (int column = threadIdx.x % kWarp; column < size; column += kWarp) {
            const int64_t at = (static_cast<int64_t>(blockIdx.x) * heads + i) * size + column;
            write_value(queries, input.dtype, at, head[column] * input.scale);
        }
        sync_warp();  // before the next head takes its place
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) widen_kernel(CacheView cache, T* output, int64_t positions, int size) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= positions * size) return;
    const int64_t row = blockIdx.y * cache.capacity + index / size, at = row * size + index % size;
    const float value = to_float(load_value(static_cast<const int8_t*>(cache.data) + at));
    store_global(output + at, from_float<T>(value * load_value<float>(cache.scales + row)));
}

template <typename T>
constexpr float kLowestOf = -3e38f;
template <>
constexpr float kLowestOf<Half> = -65504.0f;

// A thread for each position of a token and a head.
template <typename T>
__global__ void __launch_bounds__(kThreads) score_terms_kernel(AttentionInput input, T* output) {
    wait_for_earlier_kernels();
    let_the_next_kernel_start();
    const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, token = blockIdx.y;
    const int64_t batch = blockIdx.z / input.layout.heads, head = blockIdx.z % input.layout.heads;
    const int64_t positions = input.past + input.tokens;
    if (position >= positions) return;
    float term = term_at(input.mask, batch, head, token, position) + term_at(input.bias, batch, head, token, position);
    if (!input.mask.data && position > input.past + token) term = kLowestOf<T>;
    // Finite, so that a query that may look nowhere is finite too.
    term = term < kLowestOf<T> ? kLowestOf<T> : term;
    store_global(output + (static_cast<int64_t>(blockIdx.z) * input.tokens + token) * positions + position,
                 from_float<T>(term));
}

// ---- launches ----------------------------------------------------------------------------------------------------

constexpr int kMostRows = 8;  // queries of a block

int rows_of_block(const AttentionInput& input) {
    const int64_t rows = input.layout.heads / input.layout.kv_heads * input.tokens;
    return rows == 1 ? 1 : (rows <= 4 ? 4 : kMostRows);
}

template <typename C, int WIDE, int ROWS, int PACKS>
const char* launch_attend(const AttentionInput& input, const Parts& parts, void* stream) {
    const int64_t rows = input.layout.heads / input.layout.kv_heads * input.tokens;
    LaunchShape shape;
    const int64_t chunks = (rows + ROWS - 1) / ROWS;
    if (const char* error = make_grid(parts.count, input.layout.kv_heads * chunks, input.batch, shape.grid)) {
        return error;
    }
    shape.block.x = kThreads;
    shape.shared_bytes = sizeof(float) * shared_floats(ROWS, static_cast<int>(input.layout.head_dim));
    return launch_overlapping(attend_kernel<C, WIDE, ROWS, PACKS>, shape, stream, input, parts);
}

// The kernel for a head's size: narrow heads have blocks of several queries, wide ones lanes of several accesses.
template <typename C>
const char* attend_part(const AttentionInput& input, const Parts& parts, void* stream) {
    constexpr int kWide = sizeof(C) == 1 ? 8 : 16 / sizeof(C);
    const int64_t size = input.layout.head_dim;
    if (size % kWide != 0 || !are_aligned({input.keys.data, input.values.data})) {
        return launch_attend<C, 1, 1, 32>(input, parts, stream);
    }
    const int64_t packs = (size + kWarp * kWide - 1) / (kWarp * kWide);
    if constexpr (sizeof(C) == 4) {
        if (packs > 4) return launch_attend<C, kWide, 1, 8>(input, parts, stream);
    }
    if (packs > 2) return launch_attend<C, kWide, 1, 4>(input, parts, stream);
    if (packs > 1) return launch_attend<C, kWide, 1, 2>(input, parts, stream);
    switch (rows_of_block(input)) {
        case 1:
            return launch_attend<C, kWide, 1, 1>(input, parts, stream);
        case 4:
            return launch_attend<C, kWide, 4, 1>(input, parts, stream);
        default:
            return launch_attend<C, kWide, kMostRows, 1>(input, parts, stream);
    }
}

const char* merge(const AttentionInput& input, const Parts& parts, void* stream) {
    LaunchShape shape;
    if (const char* error = make_grid(input.batch * input.tokens * input.layout.heads, 1, 1, shape.grid)) return error;
    shape.block.x = kThreads;
    return launch_overlapping(merge_kernel, shape, stream, input, parts);
}

}  // namespace

const char* attention_splits(const AttentionInput& input, int& splits) {
    DeviceProperties device{};
    if (const char* error = device_properties(device)) return error;
    const int64_t rows = input.layout.heads / input.layout.kv_heads * input.tokens;
    const int64_t blocks = input.batch * input.layout.kv_heads * ((rows + kMostRows - 1) / kMostRows);
    const int64_t wanted = int64_t{kBlocksPerMultiprocessor} * device.multiprocessors / std::max<int64_t>(1, blocks);
    const int64_t possible = (input.past + input.tokens) / kFewestPositions;
    splits = static_cast<int>(std::clamp<int64_t>(std::min(wanted, possible), 1, kMostParts));
    return nullptr;
}

int64_t attention_scratch(const AttentionInput& input, int splits) {
    if (splits == 1) return 0;
    return input.batch * input.tokens * input.layout.heads * splits * (input.layout.head_dim + 2);
}

const char* attend(const AttentionInput& input, int splits, float* scratch, void* stream) {
    const int64_t sums = input.batch * input.tokens * input.layout.heads * splits * input.layout.head_dim;
    const Parts parts{splits, scratch, splits == 1 ? nullptr : scratch + sums};
    const char* error = with_cache_type(
        input, [&](auto zero) -> const char* { return attend_part<decltype(zero)>(input, parts, stream); });
    return error || splits == 1 ? error : merge(input, parts, stream);
}

const char* rotate(const AttentionInput& input, void* queries, void* stream) {
    LaunchShape shape;
    if (const char* error = make_grid(input.batch * input.tokens, 1, 1, shape.grid)) return error;
    shape.block.x = kThreads;
    shape.shared_bytes = sizeof(float) * kWarps * static_cast<size_t>(input.layout.head_dim);
    return with_cache_type(input, [&](auto zero) {
        return launch_overlapping(rotate_kernel<decltype(zero)>, shape, stream, input, queries);
    });
}

const char* widen(const CacheView& cache, void* output, Float dtype, int64_t heads, int64_t positions, int64_t head_dim,
                  void* stream) {
    LaunchShape shape;
    const int64_t blocks = (positions * head_dim + kThreads - 1) / kThreads;
    if (const char* error = make_grid(blocks, heads, 1, shape.grid)) return error;
    shape.block.x = kThreads;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_overlapping(widen_kernel<T>, shape, stream, cache, static_cast<T*>(output), positions,
                                  static_cast<int>(head_dim));
    });
}

const char* score_terms(const AttentionInput& input, void* output, void* stream) {
    LaunchShape shape;
    const int64_t blocks = (input.past + input.tokens + kThreads - 1) / kThreads;
    if (const char* error = make_grid(blocks, input.tokens, input.batch * input.layout.heads, shape.grid)) return error;
    shape.block.x = kThreads;
    return with_type(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_overlapping(score_terms_kernel<T>, shape, stream, input, static_cast<T*>(output));
    });
}

}  // namespace autoq::cuda
