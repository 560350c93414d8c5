// The steps of a decoder block between its linears: every instruction set against float64.
#include "support.h"

namespace test {
namespace {

constexpr int64_t kRows = 5;

// ---- norm, add, activation -----------------------------------------------------------------------------------------

void normalize(NormKind kind, float epsilon, double* values, int64_t count) {
    double mean = 0.0, square = 0.0;
    for (int64_t i = 0; i < count; ++i) mean += values[i] / static_cast<double>(count);
    if (kind == NormKind::kRms) mean = 0.0;
    for (int64_t i = 0; i < count; ++i) square += (values[i] - mean) * (values[i] - mean) / static_cast<double>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = (values[i] - mean) / std::sqrt(square + epsilon);
}

void test_norm(const BlockKernels& kernels, const std::string& name, Float dtype, int64_t columns) {
    const Array input = Array::random(dtype, kRows * columns);
    const Array weight = Array::random(dtype, columns), bias = Array::random(dtype, columns);
    for (NormKind kind : {NormKind::kLayer, NormKind::kRms}) {
        const bool biased = kind == NormKind::kLayer;
        std::vector<double> expected = values_of(input);
        for (int64_t row = 0; row < kRows; ++row) {
            normalize(kind, 1e-5f, &expected[static_cast<size_t>(row * columns)], columns);
            for (int64_t i = 0; i < columns; ++i) {
                double& value = expected[static_cast<size_t>(row * columns + i)];
                value = value * weight[i] + (biased ? bias[i] : 0.0f);
            }
        }
        Array output(dtype, kRows * columns);
        const Norm norm{kind, weight.data(), biased ? bias.data() : nullptr, 1e-5f};
        kernels.norm(norm, input.data(), output.data(), dtype, columns, 0, 2);
        kernels.norm(norm, input.data(), output.data(), dtype, columns, 2, kRows);
        check_close(output, expected, 2 * tolerance(dtype), name + (biased ? " layer norm" : " rms norm"));
    }
}

void test_add(const BlockKernels& kernels, const std::string& name, Float dtype, int64_t count) {
    const Array first = Array::random(dtype, count), second = Array::random(dtype, count);
    const Array third = Array::random(dtype, count);
    for (bool three : {false, true}) {
        std::vector<double> expected = values_of(first);
        for (size_t i = 0; i < expected.size(); ++i) {
            const auto index = static_cast<int64_t>(i);
            expected[i] += second[index] + (three ? third[index] : 0.0f);
        }
        Array output(dtype, count);
        kernels.add(first.data(), second.data(), three ? third.data() : nullptr, output.data(), dtype, 0, count / 3);
        kernels.add(first.data(), second.data(), three ? third.data() : nullptr, output.data(), dtype, count / 3,
                    count);
        check_close(output, expected, tolerance(dtype), name + " add");
    }
}

void test_rotary_tables(const BlockKernels& kernels, const std::string& name, Float dtype) {
    const std::vector<int64_t> positions{0, 1, 77, 131071};
    const std::vector<float> frequencies{1.0f, 0.3f, 0.0001f};
    const auto angles = static_cast<int64_t>(frequencies.size()), count = static_cast<int64_t>(positions.size());
    std::vector<double> cosines, sines;
    for (const int64_t position : positions) {
        for (int half = 0; half < 2; ++half) {
            for (const float frequency : frequencies) {
                const double angle = static_cast<float>(position) * frequency;
                cosines.push_back(1.25 * std::cos(angle));
                sines.push_back(1.25 * std::sin(angle));
            }
        }
    }
    Array found_cosines(dtype, count * 2 * angles), found_sines(dtype, count * 2 * angles);
    const RotaryTables tables{positions.data(),  count, frequencies.data(), angles, 1.25f, dtype, found_cosines.data(),
                              found_sines.data()};
    kernels.rotary_tables(tables, 0, 1);
    kernels.rotary_tables(tables, 1, count);
    check_close(found_cosines, cosines, 2 * tolerance(dtype), name + " cosines");
    check_close(found_sines, sines, 2 * tolerance(dtype), name + " sines");
}

void test_dense(const BlockKernels& kernels, const std::string& name, Float dtype, int64_t columns) {
    constexpr int64_t kOutputs = 11;
    const Array input = Array::random(dtype, kRows * columns), weight = Array::random(dtype, kOutputs * columns);
    const Array bias = Array::random(dtype, kOutputs);
    for (bool biased : {false, true}) {
        std::vector<double> expected(kRows * kOutputs, 0.0);
        double magnitude = 1.0;
        for (int64_t row = 0; row < kRows; ++row) {
            for (int64_t o = 0; o < kOutputs; ++o) {
                double& value = expected[static_cast<size_t>(row * kOutputs + o)];
                for (int64_t i = 0; i < columns; ++i) {
                    value += static_cast<double>(input[row * columns + i]) * weight[o * columns + i];
                }
                if (biased) value += bias[o];
                magnitude = std::max(magnitude, std::abs(value));
            }
        }
        Array output(dtype, kRows * kOutputs);
        const DenseProduct product{input.data(),  weight.data(), biased ? bias.data() : nullptr,
                                   output.data(), dtype,         kRows,
                                   columns,       kOutputs};
        kernels.multiply_dense(product, 0, 3);
        kernels.multiply_dense(product, 3, kOutputs);
        check_close(output, expected, magnitude * tolerance(dtype), name + " dense linear");
    }
}

double activate(ActivationKind kind, double x) {
    switch (kind) {
        case ActivationKind::kRelu:
            return x > 0.0 ? x : 0.0;
        case ActivationKind::kSilu:
            return x / (1.0 + std::exp(-x));
        case ActivationKind::kGelu:
            return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
        case ActivationKind::kGeluTanh:
            return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
        default:
            return x / (1.0 + std::exp(-1.702 * x));
    }
}

void test_activation(const BlockKernels& kernels, const std::string& name, Float dtype, int64_t columns) {
    constexpr ActivationKind kKinds[] = {ActivationKind::kRelu, ActivationKind::kSilu, ActivationKind::kGelu,
                                         ActivationKind::kGeluTanh, ActivationKind::kQuickGelu};
    Array scales(dtype, columns);
    for (int64_t i = 0; i < columns; ++i) scales.set(i, 0.5f + static_cast<float>(integer(100)) / 50.0f);
    for (ActivationKind kind : kKinds) {
        for (bool gated : {false, true}) {
            const int64_t width = gated ? 2 * columns : columns;
            const Array input = Array::random(dtype, kRows * width, 4.0f);
            std::vector<double> expected;
            for (int64_t i = 0; i < kRows * columns; ++i) {
                const int64_t place = i / columns * width + i % columns;
                const double gate = gated ? input[place + columns] : 1.0f;
                expected.push_back(activate(kind, input[place]) * gate / (gated ? 1.0f : scales[i % columns]));
            }
            Array output(dtype, kRows * columns);
            const void* divisors = gated ? nullptr : scales.data();
            kernels.activate(kind, gated, input.data(), divisors, output.data(), dtype, columns, 0, kRows);
            check_close(output, expected, 2 * tolerance(dtype),
                        name + " activation " + std::to_string(static_cast<int>(kind)));
        }
    }
}

// ---- attention -----------------------------------------------------------------------------------------------------

enum class Mask { kNone, kBoolean, kAdded };

struct Case {
    Float dtype;
    int64_t heads, kv_heads, head_dim, tokens, past;
    RotaryKind rotary;
    bool bytes, head_norms;
    float clip;
    Mask mask;
    bool bias;
};

// Keys or values of a case: what is past is random, the rest to be written.
struct Cache {
    Array values;
    std::vector<int8_t> bytes;
    std::vector<float> scales;
    CacheView view;

    Cache(const Case& c, int64_t batch, int64_t capacity)
        : values(Array::random(c.dtype, batch * c.kv_heads * capacity * c.head_dim)) {
        for (int64_t i = 0; i < values.count(); ++i) bytes.push_back(static_cast<int8_t>(integer(255) - 127));
        for (int64_t i = 0; i < values.count() / c.head_dim; ++i) scales.push_back(0.01f * std::fabs(gaussian()));
        view = c.bytes ? CacheView{bytes.data(), scales.data(), c.kv_heads, capacity}
                       : CacheView{values.data(), nullptr, c.kv_heads, capacity};
    }

    double at(int64_t row, int64_t size, int64_t i) const {
        const int64_t index = row * size + i;
        if (!view.scales) return values[index];
        return bytes[static_cast<size_t>(index)] * static_cast<double>(view.scales[row]);
    }
};

struct Attention {
    static constexpr int64_t kBatch = 2;

    const Case& c;
    int64_t positions;
    HeadLayout layout;
    Array qkv, query_weight, key_weight, cosines, sines, added;
    std::vector<uint8_t> allowed;
    std::vector<float> alibi, queries;
    Cache keys, values;
    Array output;
    AttentionInput input{};

    explicit Attention(const Case& c)
        : c(c),
          positions(c.past + c.tokens),
          layout{
              c.heads,   c.kv_heads, c.head_dim, c.heads, 0, c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim,
              c.head_dim},
          qkv(Array::random(c.dtype, kBatch * c.tokens * layout.row_size())),
          query_weight(Array::random(c.dtype, c.head_dim)),
          key_weight(Array::random(c.dtype, c.head_dim)),
          cosines(Array::random(c.dtype, c.tokens * angles())),
          sines(Array::random(c.dtype, c.tokens * angles())),
          added(Array::random(c.dtype, kBatch * c.tokens * positions)),
          queries(static_cast<size_t>(kBatch * c.tokens * c.heads * 1024)),
          keys(c, kBatch, positions + 3),
          values(c, kBatch, positions + 3),
          output(c.dtype, kBatch * c.tokens * c.heads * c.head_dim) {
        for (int64_t i = 0; i < kBatch * c.tokens * positions; ++i) {
            allowed.push_back(i % positions == 0 || integer(3) > 0 ? 1 : 0);
        }
        for (int64_t i = 0; i < c.heads * positions; ++i) alibi.push_back(gaussian());
        fill_input();
    }

    int64_t angles() const { return c.head_dim / 4; }

    void fill_input() {
        input.layout = layout;
        input.dtype = c.dtype;
        input.batch = kBatch;
        input.tokens = c.tokens;
        input.past = c.past;
        input.qkv = qkv.data();
        input.clip = c.clip;
        input.query_norm = {NormKind::kRms, c.head_norms ? query_weight.data() : nullptr, nullptr, 1e-6f};
        input.key_norm = {NormKind::kRms, c.head_norms ? key_weight.data() : nullptr, nullptr, 1e-6f};
        input.rotary = {c.rotary, cosines.data(), sines.data(), angles(), 0, angles()};
        input.keys = keys.view;
        input.values = values.view;
        input.scale = 0.3f;
        if (c.mask == Mask::kBoolean) {
            input.mask = {allowed.data(), true, 0, Float::kFloat32, c.tokens * positions, 0, positions, 1};
        } else if (c.mask == Mask::kAdded) {
            input.mask = {added.data(), false, 0, c.dtype, c.tokens * positions, 0, positions, 1};
        }
        if (c.bias) input.bias = {alibi.data(), false, 0, Float::kFloat32, 0, positions, 0, 1};
        input.queries = queries.data();
        input.output = output.data();
    }

    void run(const BlockKernels& kernels) {
        kernels.rotate(input, 0, kBatch * c.tokens / 2);
        kernels.rotate(input, kBatch * c.tokens / 2, kBatch * c.tokens);
        const int64_t shared = c.heads / c.kv_heads;
        for (int64_t batch = 0; batch < kBatch; ++batch) {
            for (int64_t group = 0; group < c.kv_heads; ++group) {
                kernels.attend(input, batch, group * shared, shared, 0, c.tokens);
            }
        }
    }

    // A head of a token after clipping, norm and rotation; `start` is where it begins in the row.
    std::vector<double> head(int64_t batch, int64_t token, int64_t start, const void* weight, bool rotate) const {
        std::vector<double> x;
        for (int64_t i = 0; i < c.head_dim; ++i) {
            const double value = qkv[(batch * c.tokens + token) * layout.row_size() + start + i];
            x.push_back(c.clip > 0.0f ? std::clamp<double>(value, -c.clip, c.clip) : value);
        }
        if (weight) {
            normalize(NormKind::kRms, 1e-6f, x.data(), c.head_dim);
            for (int64_t i = 0; i < c.head_dim; ++i) x[static_cast<size_t>(i)] *= load_float(weight, c.dtype, i);
        }
        if (!rotate || c.rotary == RotaryKind::kNone) return x;
        for (int64_t i = 0; i < angles(); ++i) {
            const bool halves = c.rotary == RotaryKind::kHalves;
            double& first = x[static_cast<size_t>(halves ? i : 2 * i)];
            double& second = x[static_cast<size_t>(halves ? i + angles() : 2 * i + 1)];
            const double cosine = cosines[token * angles() + i], sine = sines[token * angles() + i], old = first;
            first = old * cosine - second * sine;
            second = second * cosine + old * sine;
        }
        return x;
    }

    // What the cache got for a token, against what it should have.
    void check_cache(const std::string& name) const {
        for (int64_t index = 0; index < kBatch * c.tokens * c.kv_heads; ++index) {
            const int64_t group = index % c.kv_heads, token = index / c.kv_heads % c.tokens;
            const int64_t batch = index / c.kv_heads / c.tokens;
            const int64_t row = keys.view.row(batch, group, c.past + token);
            const std::vector<double> key = head(batch, token, layout.key(group), input.key_norm.weight, true);
            const std::vector<double> value = head(batch, token, layout.value(group), nullptr, false);
            const double bound = c.bytes ? 1e-2 : 4 * tolerance(c.dtype);
            check(difference(keys, row, key) < bound, name + ": keys in the cache");
            check(difference(values, row, value) < bound, name + ": values in the cache");
        }
    }

    double difference(const Cache& cache, int64_t row, const std::vector<double>& expected) const {
        double largest = 0.0, error = 0.0;
        for (int64_t i = 0; i < c.head_dim; ++i) {
            const double wanted = expected[static_cast<size_t>(i)];
            largest = std::max(largest, std::fabs(wanted));
            error = std::max(error, std::fabs(wanted - cache.at(row, c.head_dim, i)));
        }
        return error / largest;
    }

    // The score of a query with a position, or minus infinity.
    double score(const std::vector<double>& query, int64_t batch, int64_t head, int64_t token, int64_t position) const {
        const auto place = static_cast<size_t>((batch * c.tokens + token) * positions + position);
        if (c.mask == Mask::kNone && position > c.past + token) return -INFINITY;
        if (c.mask == Mask::kBoolean && !allowed[place]) return -INFINITY;
        double sum = c.mask == Mask::kAdded ? added[static_cast<int64_t>(place)] : 0.0;
        if (c.bias) sum += alibi[static_cast<size_t>(head * positions + position)];
        const int64_t row = keys.view.row(batch, head / (c.heads / c.kv_heads), position);
        for (int64_t i = 0; i < c.head_dim; ++i) {
            sum += input.scale * query[static_cast<size_t>(i)] * keys.at(row, c.head_dim, i);
        }
        return sum;
    }

    // Attention over what is in the caches now.
    std::vector<double> expected() const {
        std::vector<double> result;
        for (int64_t index = 0; index < kBatch * c.tokens * c.heads; ++index) {
            const int64_t h = index % c.heads, token = index / c.heads % c.tokens, batch = index / c.heads / c.tokens;
            const std::vector<double> query = head(batch, token, layout.query(h), input.query_norm.weight, true);
            std::vector<double> sums(static_cast<size_t>(c.head_dim));
            double total = 0.0;
            for (int64_t position = 0; position < positions; ++position) {
                const double weight = std::exp(score(query, batch, h, token, position));
                const int64_t row = values.view.row(batch, h / (c.heads / c.kv_heads), position);
                total += weight;
                for (int64_t i = 0; i < c.head_dim; ++i) {
                    sums[static_cast<size_t>(i)] += weight * values.at(row, c.head_dim, i);
                }
            }
            for (double sum : sums) result.push_back(sum / total);
        }
        return result;
    }
};

void test_widen(const BlockKernels& kernels, const std::string& name, const Attention& attention) {
    const Cache& cache = attention.keys;
    if (!cache.view.scales) return;
    const int64_t size = attention.c.head_dim, rows = cache.values.count() / size;
    std::vector<double> expected;
    for (int64_t i = 0; i < rows * size; ++i) expected.push_back(cache.at(i / size, size, i % size));
    Array wide(attention.c.dtype, rows * size);
    kernels.widen(cache.view, wide.data(), attention.c.dtype, size, 0, rows);
    check_close(wide, expected, tolerance(attention.c.dtype), name + " widen");
}

void test_attention(const BlockKernels& kernels, const std::string& name) {
    for (Float dtype : kDtypes) {
        const Case cases[] = {
            {dtype, 4, 2, 64, 1, 130, RotaryKind::kHalves, false, false, 0.0f, Mask::kNone, false},
            {dtype, 4, 2, 64, 1, 130, RotaryKind::kHalves, true, true, 0.0f, Mask::kNone, false},
            {dtype, 3, 1, 80, 6, 70, RotaryKind::kPairs, false, false, 1.0f, Mask::kAdded, false},
            {dtype, 2, 2, 20, 9, 0, RotaryKind::kNone, false, false, 0.0f, Mask::kBoolean, true},
            {dtype, 6, 2, 36, 7, 64, RotaryKind::kPairs, true, true, 1.5f, Mask::kBoolean, false},
            {dtype, 4, 2, 64, 75, 70, RotaryKind::kHalves, false, false, 0.0f, Mask::kNone, false},
            {dtype, 3, 3, 20, 70, 3, RotaryKind::kNone, true, true, 0.0f, Mask::kAdded, false},
            {dtype, 8, 2, 64, 1, 130, RotaryKind::kHalves, false, false, 0.0f, Mask::kNone, false},
            {dtype, 5, 1, 48, 1, 131, RotaryKind::kHalves, true, true, 0.0f, Mask::kAdded, false},
            {dtype, 20, 1, 24, 1, 70, RotaryKind::kNone, false, false, 0.0f, Mask::kBoolean, false},
            {dtype, 6, 1, 21, 14, 61, RotaryKind::kNone, false, false, 0.0f, Mask::kNone, false},
        };
        for (const Case& c : cases) {
            const std::string what = name + " attention in " + name_of(dtype) + ", heads of " +
                                     std::to_string(c.head_dim) + (c.bytes ? ", cache of bytes" : "");
            Attention attention(c);
            attention.run(kernels);
            attention.check_cache(what);
            check_close(attention.output, attention.expected(), 4 * tolerance(dtype), what);
            test_widen(kernels, what, attention);
        }
    }
}

}  // namespace

void test_block() {
    const BlockKernels* tested = nullptr;
    for (const std::string& name : capabilities()) {
        set_capability(name);
        const BlockKernels& of_set = *kernels().block;
        if (&of_set == tested) continue;  // the set before shares them
        tested = &of_set;
        for (Float dtype : kDtypes) {
            test_rotary_tables(of_set, name + ", " + name_of(dtype) + ":", dtype);
            for (int64_t columns : {1, 16, 37, 128}) {
                const std::string what = name + ", " + name_of(dtype) + ", " + std::to_string(columns) + " columns:";
                test_norm(of_set, what, dtype, columns);
                test_add(of_set, what, dtype, kRows * columns + 6);  // of one sum, cancellation may leave nothing
                test_activation(of_set, what, dtype, columns);
                test_dense(of_set, what, dtype, columns);
            }
        }
        test_attention(of_set, name);
    }
}

}  // namespace test
