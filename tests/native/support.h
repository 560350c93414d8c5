// What the tests of the kernels share: random values, arrays of every dtype with guards behind them, and checks.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

namespace test {

using namespace autoq;
using namespace autoq::cpu;

constexpr Float kDtypes[] = {Float::kFloat32, Float::kBFloat16, Float::kFloat16};

inline std::mt19937& generator() {
    static std::mt19937 numbers(0);
    return numbers;
}

inline float gaussian() { return std::normal_distribution<float>()(generator()); }
inline int integer(int below) { return std::uniform_int_distribution<int>(0, below - 1)(generator()); }

struct Tally {
    int checks = 0, failures = 0;
};

inline Tally& tally() {
    static Tally counts;
    return counts;
}

inline void check(bool holds, const std::string& what) {
    ++tally().checks;
    if (holds) return;
    if (++tally().failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

inline std::string name_of(Float dtype) {
    return dtype == Float::kFloat32 ? "fp32" : dtype == Float::kBFloat16 ? "bf16" : "fp16";
}

// What rounding a result to the dtype may cost, relative to its norm; of fp32, what the arithmetic may.
inline double tolerance(Float dtype) {
    return dtype == Float::kFloat32 ? 1e-6 : dtype == Float::kBFloat16 ? 4e-3 : 6e-4;
}

// Values of a dtype, and behind them bytes that must stay as they are.
class Array {
  public:
    Array(Float dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(size() + kGuard, kUntouched) {}

    static Array random(Float dtype, int64_t count, float factor = 1.0f) {
        Array array(dtype, count);
        for (int64_t i = 0; i < count; ++i) array.set(i, gaussian() * factor);
        return array;
    }

    Float dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    float operator[](int64_t index) const { return load_float(data(), dtype_, index); }
    void set(int64_t index, float value) { store_float(data(), dtype_, index, value); }

    bool operator==(const Array& other) const { return bytes_ == other.bytes_; }
    bool is_guarded() const {
        for (size_t i = size(); i < bytes_.size(); ++i) {
            if (bytes_[i] != kUntouched) return false;
        }
        return true;
    }

  private:
    static constexpr size_t kGuard = 256;
    static constexpr uint8_t kUntouched = 0xa5;

    size_t size() const { return static_cast<size_t>(count_) * (dtype_ == Float::kFloat32 ? 4 : 2); }

    Float dtype_;
    int64_t count_;
    std::vector<uint8_t> bytes_;
};

inline std::vector<double> values_of(const Array& array) {
    std::vector<double> values;
    for (int64_t i = 0; i < array.count(); ++i) values.push_back(array[i]);
    return values;
}

inline double relative_error(const Array& actual, const std::vector<double>& expected) {
    double error = 0.0, norm = 1e-300;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = actual[static_cast<int64_t>(i)] - expected[i];
        error += difference * difference;
        norm += expected[i] * expected[i];
    }
    return std::sqrt(error / norm);
}

inline void check_close(const Array& actual, const std::vector<double>& expected, double bound,
                        const std::string& what) {
    const double error = relative_error(actual, expected);
    check(error < bound, what + ": the relative error is " + std::to_string(error));
    check(actual.is_guarded(), what + ": it wrote behind the result");
}

void test_linear();
void test_block();
void test_search();

}  // namespace test
