// What the search for ranges and the rounding spend their time on: every instruction set against float64.
#include "support.h"

namespace test {
namespace {

float uniform(float from, float to) { return std::uniform_real_distribution<float>(from, to)(generator()); }

std::vector<float> gaussians(int64_t count) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(gaussian());
    return values;
}

// X^T X of twice as many rows as columns, [size, size].
std::vector<float> gram_of(int64_t size) {
    const std::vector<float> inputs = gaussians(2 * size * size);
    std::vector<float> gram;
    for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < size; ++j) {
            double sum = 0.0;
            for (int64_t row = 0; row < 2 * size; ++row) {
                sum += static_cast<double>(inputs[row * size + i]) * inputs[row * size + j];
            }
            gram.push_back(static_cast<float>(sum));
        }
    }
    return gram;
}

void check_near(double actual, double expected, double bound, const std::string& what) {
    check(std::abs(actual - expected) <= bound,
          what + ": " + std::to_string(actual) + " for " + std::to_string(expected));
}

// ---- errors of groups -----------------------------------------------------------------------------------------------

// What rounding a group that is cut to a range adds to its values. The choice of the codes is fp32's.
std::vector<double> rounded(const float* weights, int64_t size, float low, float high, int bits, bool zero_point) {
    float least = 0.0f, most = 0.0f;
    const auto cut = [&](float value) { return std::min(std::max(value, low), high); };
    for (int64_t i = 0; i < size; ++i) {
        least = std::min(least, cut(weights[i]));
        most = std::max(most, cut(weights[i]));
    }
    const float codes = static_cast<float>((1 << bits) - 1), half = static_cast<float>(1 << (bits - 1));
    const float range = zero_point ? (most - least) / codes : std::max(-least, most) / std::max(half - 1.0f, 1.0f);
    const float scale = static_cast<float>(c10::Half(std::max(range, std::ldexp(1.0f, -24))));
    const float zero = zero_point ? std::min(std::max(std::nearbyint(-least / scale), 0.0f), codes) : half;
    std::vector<double> differences;
    for (int64_t i = 0; i < size; ++i) {
        const float code = std::min(std::max(std::nearbyint(cut(weights[i]) / scale), -zero), codes - zero);
        differences.push_back(static_cast<double>(code) * scale - weights[i]);
    }
    return differences;
}

void test_group_errors(const SearchKernels& kernels, const std::string& name, int64_t size, int bits, bool zero_point) {
    constexpr int64_t kRows = 7, kGroups = 2;
    const std::vector<float> weights = gaussians(kRows * kGroups * size);
    std::vector<float> gram, low, high;
    for (int64_t group = 0; group < kGroups; ++group) {
        const std::vector<float> one = gram_of(size);
        gram.insert(gram.end(), one.begin(), one.end());
    }
    for (int64_t i = 0; i < kRows * kGroups; ++i) {
        high.push_back(uniform(0.5f, 2.0f));
        low.push_back(zero_point ? -uniform(0.5f, 2.0f) : -high.back());
    }
    Array errors(Float::kFloat32, kRows * kGroups);
    const GroupErrors work{weights.data(), low.data(), high.data(), gram.data(), static_cast<float*>(errors.data()),
                           kRows,          kGroups,    size,        bits,        zero_point};
    std::vector<double> expected;
    for (int64_t i = 0; i < kRows * kGroups; ++i) {
        const std::vector<double> difference = rounded(&weights[i * size], size, low[i], high[i], bits, zero_point);
        double sum = 0.0;
        for (int64_t row = 0; row < size; ++row) {
            for (int64_t column = 0; column < size; ++column) {
                sum += difference[row] * difference[column] * gram[(i % kGroups * size + row) * size + column];
            }
        }
        expected.push_back(sum);
    }
    for (int64_t group = 0; group < kGroups; ++group) {
        kernels.group_errors(work, group, 0, 1);
        kernels.group_errors(work, group, 1, kRows);
    }
    check_close(errors, expected, 1e-5, name + " errors of groups of " + std::to_string(size));
}

// ---- channels, one after the other ----------------------------------------------------------------------------------

struct Case {
    int64_t channels, outputs, groups;
    int bits;
    std::vector<float> scales, zeros, codes, factors;

    Case(int64_t channels_, int64_t outputs_, int64_t groups_, int bits_)
        : channels(channels_), outputs(outputs_), groups(groups_), bits(bits_) {
        for (int64_t i = 0; i < channels * outputs; ++i) codes.push_back(static_cast<float>(integer(1 << bits)));
        for (int64_t i = 0; i < groups * outputs; ++i) {
            scales.push_back(uniform(0.1f, 0.3f));
            zeros.push_back(static_cast<float>(integer(1 << bits)));
        }
        factors = gram_of(channels);
        for (float& factor : factors) factor /= static_cast<float>(2 * channels);
    }

    Channels work(Array* values, Array* pulls, Array* gradient, Array& written) const {
        const auto data = [](Array* array) { return array == nullptr ? nullptr : static_cast<float*>(array->data()); };
        return {data(values),   data(pulls), data(gradient), data(&written),    scales.data(), zeros.data(),
                factors.data(), channels,    outputs,        channels / groups, bits};
    }

    double scale(int64_t channel, int64_t output) const { return of_group(scales, channel, output); }
    double zero(int64_t channel, int64_t output) const { return of_group(zeros, channel, output); }

    // Follows the kernel in float64, code by code: each must be the nearest, but for rounding.
    void check_code(double value, int64_t channel, int64_t output, double code, const std::string& what) const {
        const double last = (1 << bits) - 1;
        const double wanted = std::min(std::max(value / scale(channel, output) + zero(channel, output), 0.0), last);
        check(code == std::nearbyint(code) && code >= 0.0 && code <= last, what + ": a code is none");
        check_near(code, wanted, 0.501, what + ": a code");
    }

  private:
    double of_group(const std::vector<float>& values, int64_t channel, int64_t output) const {
        return values[static_cast<size_t>(channel / (channels / groups) * outputs + output)];
    }
};

void test_compensation(const SearchKernels& kernels, const std::string& name, const Case& work) {
    const Array start = Array::random(Float::kFloat32, work.channels * work.outputs);
    const Array pulled = Array::random(Float::kFloat32, start.count(), 0.1f);
    Array values = start, pulls = pulled, codes(Float::kFloat32, start.count());
    const Channels channels = work.work(&values, &pulls, nullptr, codes);
    kernels.compensate(channels, 0, 16);
    kernels.compensate(channels, 16, work.outputs);
    std::vector<double> exact = values_of(start), moved = values_of(pulled);
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        const float* factors = &work.factors[static_cast<size_t>(channel * work.channels)];
        for (int64_t output = 0; output < work.outputs; ++output) {
            const auto index = static_cast<size_t>(channel * work.outputs + output);
            const double code = codes[static_cast<int64_t>(index)];
            moved[index] += exact[index];
            work.check_code(moved[index], channel, output, code, name + " compensation");
            const double grid = (code - work.zero(channel, output)) * work.scale(channel, output);
            exact[index] -= grid;
            moved[index] -= grid;
            for (int64_t behind = channel + 1; behind < work.channels; ++behind) {
                moved[static_cast<size_t>(behind * work.outputs + output)] += factors[behind] * exact[index];
            }
        }
    }
    check_close(values, exact, 1e-5, name + " compensation's errors");
    check_close(pulls, moved, 1e-5, name + " compensation's errors of what was moved");
    check(codes.is_guarded(), name + " compensation: it wrote behind the codes");
}

void test_descent(const SearchKernels& kernels, const std::string& name, const Case& work) {
    const Array start = Array::random(Float::kFloat32, work.channels * work.outputs, 0.2f);
    Array gradient = start, codes(Float::kFloat32, gradient.count());
    for (int64_t i = 0; i < codes.count(); ++i) codes.set(i, work.codes[static_cast<size_t>(i)]);
    const Channels channels = work.work(nullptr, nullptr, &gradient, codes);
    kernels.descend(channels, 0, 16);
    kernels.descend(channels, 16, work.outputs);
    std::vector<double> exact = values_of(start);
    for (int64_t channel = 0; channel < work.channels; ++channel) {
        const float* factors = &work.factors[static_cast<size_t>(channel * work.channels)];
        for (int64_t output = 0; output < work.outputs; ++output) {
            const auto index = static_cast<size_t>(channel * work.outputs + output);
            const double before = work.codes[index], scale = work.scale(channel, output);
            const double wanted = (before - work.zero(channel, output)) * scale - exact[index] / factors[channel];
            const double code = codes[static_cast<int64_t>(index)];
            work.check_code(wanted, channel, output, code, name + " descent");
            for (int64_t other = 0; other < work.channels; ++other) {
                exact[static_cast<size_t>(other * work.outputs + output)] += factors[other] * (code - before) * scale;
            }
        }
    }
    check_close(gradient, exact, 1e-5, name + " descent's gradient");
    check(codes.is_guarded() && gradient.is_guarded(), name + " descent: it wrote behind its results");
}

}  // namespace

void test_search() {
    for (const std::string& name : capabilities()) {
        set_capability(name);
        const SearchKernels& search = *kernels().search;
        for (int64_t size : {16, 48, 64, 128}) {
            test_group_errors(search, name, size, 3, true);
            test_group_errors(search, name, size, 4, false);
        }
        for (const auto& [channels, outputs, groups, bits] :
             {std::tuple{1, 17, 1, 2}, {24, 32, 3, 4}, {33, 61, 11, 8}, {150, 18, 2, 4}}) {
            test_compensation(search, name, Case(channels, outputs, groups, bits));
            test_descent(search, name, Case(channels, outputs, groups, bits));
        }
    }
}

}  // namespace test
