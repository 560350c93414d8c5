// The search's kernels in one source for every instruction set. Included by search_kernels.cpp, once for each, inside
// its namespace and its target region; no include guard.
#include "vector.h"

// Rows whose products with a Gram matrix are made together, and lanes of sixteen columns: as many as there are
// registers for.
#if AUTOQ_LEVEL == 512
constexpr int kTileRows = 6, kTileLanes = 4;
#elif AUTOQ_LEVEL == 256
constexpr int kTileRows = 2, kTileLanes = 2;
#elif AUTOQ_LEVEL == 128
constexpr int kTileRows = 4, kTileLanes = 1;
#else
constexpr int kTileRows = 2, kTileLanes = 1;
#endif

// Where the values of a group go: to `code * scale`, the code, less its zero point, between two ends.
struct Grid {
    float scale, lowest, highest;
};

// The arithmetic of autoq/quantization/weight.py, for values from `least` to `most`.
AUTOQ_VECTOR Grid grid_of(float least, float most, int bits, bool zero_point) {
    const float codes = static_cast<float>((1 << bits) - 1), half = static_cast<float>(1 << (bits - 1));
    least = std::min(least, 0.0f);
    most = std::max(most, 0.0f);
    const float range = zero_point ? (most - least) / codes : std::max(-least, most) / std::max(half - 1.0f, 1.0f);
    const float scale = c10::Half(std::max(range, kSmallestScale));
    if (!zero_point) return {scale, -half, half - 1.0f};
    const float zero = std::min(std::max(std::nearbyint(-least / scale), 0.0f), codes);
    return {scale, -zero, codes - zero};
}

// What rounding the cut values of a group adds to the values themselves.
AUTOQ_VECTOR void round_group(const GroupErrors& work, int64_t row, int64_t group, float* differences) {
    const int64_t index = row * work.groups + group, first = index * work.size;
    const Lanes low = all_lanes(work.low[index]), high = all_lanes(work.high[index]);
    Lanes least = all_lanes(INFINITY), most = all_lanes(-INFINITY);
    for (int64_t column = 0; column < work.size; column += 16) {
        const Lanes value = load<Float::kFloat32>(work.weights, first + column);
        least = smaller(value, least);
        most = larger(value, most);
    }
    const auto cut = [&](Lanes value) __attribute__((always_inline)) { return smaller(larger(value, low), high); };
    const Grid grid = grid_of(-largest_of(-cut(least)), largest_of(cut(most)), work.bits, work.zero_point);
    const Lanes scale = all_lanes(grid.scale), lowest = all_lanes(grid.lowest), highest = all_lanes(grid.highest);
    const Lanes magic = all_lanes(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers, ties to even
    for (int64_t column = 0; column < work.size; column += 16) {
        const Lanes value = load<Float::kFloat32>(work.weights, first + column);
        const Lanes code = cut(value) / scale + magic - magic;
        store<Float::kFloat32>(differences, column, smaller(larger(code, lowest), highest) * scale - value);
    }
}

// sums += differences * (differences x gram), of sixteen columns LANES times.
template <int LANES>
AUTOQ_VECTOR void add_products(const float* gram, const float* differences, int64_t size, int64_t column,
                               Lanes (&sums)[kTileRows]) {
    Lanes products[kTileRows][LANES] = {};
    for (int64_t i = 0; i < size; ++i) {
        Lanes across[LANES];
        for (int lane = 0; lane < LANES; ++lane)
            across[lane] = load<Float::kFloat32>(gram, i * size + column + lane * 16);
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row) {
            const Lanes value = all_lanes(differences[row * size + i]);
#pragma GCC unroll 8
            for (int lane = 0; lane < LANES; ++lane) {
                products[row][lane] = multiply_add(value, across[lane], products[row][lane]);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 8
        for (int lane = 0; lane < LANES; ++lane) {
            const Lanes difference = load<Float::kFloat32>(differences, row * size + column + lane * 16);
            sums[row] = multiply_add(products[row][lane], difference, sums[row]);
        }
    }
}

void group_errors(const GroupErrors& work, int64_t group, int64_t begin, int64_t end) {
    static thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(kTileRows * work.size));
    float* differences = memory.data();
    const float* gram = work.gram + group * work.size * work.size;
    for (int64_t first = begin; first < end; first += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, end - first);
        for (int64_t row = 0; row < kTileRows; ++row) {
            // Where there are fewer rows, the last one stands in for the others.
            round_group(work, first + std::min(row, rows - 1), group, differences + row * work.size);
        }
        Lanes sums[kTileRows] = {};
        int64_t column = 0;
        for (; column + kTileLanes * 16 <= work.size; column += kTileLanes * 16) {
            add_products<kTileLanes>(gram, differences, work.size, column, sums);
        }
        for (; column < work.size; column += 16) add_products<1>(gram, differences, work.size, column, sums);
        for (int64_t row = 0; row < rows; ++row) work.errors[(first + row) * work.groups + group] = sum_of(sums[row]);
    }
}

// ---- channels, one after the other ---------------------------------------------------------------------------------

AUTOQ_VECTOR Lanes load_outputs(const float* data, int64_t index, int64_t count) {
    return load_some<Float::kFloat32>(data, index, count);
}

// The codes of the grid values nearest to some values.
AUTOQ_VECTOR Lanes nearest_codes(Lanes values, Lanes scale, Lanes zero, int bits) {
    // Beyond this all are at an end of the grid; and the sum below rounds what is less.
    const Lanes far = all_lanes(4194304.0f), magic = all_lanes(12582912.0f);
    const Lanes steps = smaller(larger(values / scale, -far), far);
    const Lanes codes = steps + magic - magic + zero;
    return smaller(larger(codes, Lanes{}), all_lanes(static_cast<float>((1 << bits) - 1)));
}

// What sixteen outputs, or `count`, have of a channel's group; ones for the scales of lanes without an output.
AUTOQ_VECTOR Lanes load_scale(const Channels& work, int64_t channel, int64_t first, int64_t count) {
    const Lanes scale = load_outputs(work.scales, channel / work.group_size * work.outputs + first, count);
    return count < 16 ? where_less(Lanes{}, scale, scale, all_lanes(1.0f)) : scale;
}

AUTOQ_VECTOR Lanes load_zero(const Channels& work, int64_t channel, int64_t first, int64_t count) {
    return load_outputs(work.zeros, channel / work.group_size * work.outputs + first, count);
}

// Sixteen outputs, or `count`, from `first`. `pulls`: what each channel's value moves by, sixteen lanes each.
AUTOQ_VECTOR void compensate_outputs(const Channels& work, int64_t first, int64_t count, float* pulls) {
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        store<Float::kFloat32>(pulls, channel * 16, load_outputs(work.pulls, channel * work.outputs + first, count));
    }
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        const int64_t index = channel * work.outputs + first;
        const float* factors = work.factors + channel * work.channels;
        const Lanes scale = load_scale(work, channel, first, count), zero = load_zero(work, channel, first, count);
        const Lanes value = load_outputs(work.values, index, count);
        const Lanes wanted = value + load<Float::kFloat32>(pulls, channel * 16);
        const Lanes code = nearest_codes(wanted, scale, zero, work.bits);
        const Lanes rounded = (code - zero) * scale, error = value - rounded;
        store_some<Float::kFloat32>(work.codes, index, count, code);
        store_some<Float::kFloat32>(work.values, index, count, error);
        store_some<Float::kFloat32>(work.pulls, index, count, wanted - rounded);
        for (int64_t behind = channel + 1; behind < work.channels; ++behind) {
            const Lanes pull = load<Float::kFloat32>(pulls, behind * 16);
            store<Float::kFloat32>(pulls, behind * 16, multiply_add(error, all_lanes(factors[behind]), pull));
        }
    }
}

void compensate(const Channels& work, int64_t begin, int64_t end) {
    static thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(work.channels * 16));
    for (int64_t first = begin; first < end; first += 16) {
        compensate_outputs(work, first, std::min<int64_t>(16, end - first), memory.data());
    }
}

// A change of a channel's weights, one for each of sixteen outputs.
struct Step {
    Lanes by;
    const float* factors;  // of the channel
};

// What `COUNT` changed channels do to the gradient of channels [begin, end).
template <int COUNT>
AUTOQ_VECTOR void add_steps(const Step* steps, float* gradient, int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
        Lanes sum = load<Float::kFloat32>(gradient, channel * 16);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) sum = multiply_add(steps[i].by, all_lanes(steps[i].factors[channel]), sum);
        store<Float::kFloat32>(gradient, channel * 16, sum);
    }
}

// Channels whose changes reach the others together; within a block they reach each other at once.
constexpr int64_t kDescentBlock = 128;

// Sixteen outputs, or `count`, from `first`, whose `gradient` has sixteen lanes for each channel. Few codes change, one
// in a hundred after compensated rounding, and a channel in six for one of sixteen outputs: only those cost more than
// a look.
AUTOQ_VECTOR void descend_outputs(const Channels& work, int64_t first, int64_t count, float* gradient) {
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        const int64_t index = channel * work.outputs + first;
        store<Float::kFloat32>(gradient, channel * 16, load_outputs(work.gradient, index, count));
    }
    for (int64_t begin = 0; begin < work.channels; begin += kDescentBlock) {
        const int64_t end = std::min(begin + kDescentBlock, work.channels);
        Step steps[kDescentBlock];
        int64_t changed = 0;
        for (int64_t channel = begin; channel < end; ++channel) {
            const int64_t index = channel * work.outputs + first;
            const float* factors = work.factors + channel * work.channels;
            const Lanes scale = load_scale(work, channel, first, count), zero = load_zero(work, channel, first, count);
            const Lanes before = load_outputs(work.codes, index, count);
            const Lanes down = load<Float::kFloat32>(gradient, channel * 16) / all_lanes(factors[channel]);
            const Lanes code = nearest_codes((before - zero) * scale - down, scale, zero, work.bits);
            const Lanes move = code - before;
            if (largest_of(larger(move, -move)) == 0.0f) continue;
            store_some<Float::kFloat32>(work.codes, index, count, code);
            steps[changed] = {move * scale, factors};
            add_steps<1>(steps + changed++, gradient, begin, end);
        }
        int64_t done = 0;
        for (; done + 8 <= changed; done += 8) {
            add_steps<8>(steps + done, gradient, 0, begin);
            add_steps<8>(steps + done, gradient, end, work.channels);
        }
        for (; done < changed; ++done) {
            add_steps<1>(steps + done, gradient, 0, begin);
            add_steps<1>(steps + done, gradient, end, work.channels);
        }
    }
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        const int64_t index = channel * work.outputs + first;
        store_some<Float::kFloat32>(work.gradient, index, count, load<Float::kFloat32>(gradient, channel * 16));
    }
}

void descend(const Channels& work, int64_t begin, int64_t end) {
    static thread_local std::vector<float> memory;
    memory.resize(static_cast<size_t>(work.channels * 16));
    for (int64_t first = begin; first < end; first += 16) {
        descend_outputs(work, first, std::min<int64_t>(16, end - first), memory.data());
    }
}

const SearchKernels kernels_of_set = {group_errors, compensate, descend};
