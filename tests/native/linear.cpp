// The kernels of a linear: every instruction set against float64, and bit for bit against the portable one.
#include "../../csrc/cpu/digits.h"
#include "support.h"

namespace test {
namespace {

// A weight with every code and zero point equally likely, packed as csrc/layout.h draws it.
struct Weight {
    int bits;
    int64_t outputs, inputs, groups;
    std::vector<uint8_t> zeros;
    std::vector<float> scales;
    std::vector<double> dense;  // code minus zero point, times scale: exact in fp32
    std::vector<uint32_t> words;
    std::vector<uint16_t> packed_scales;
    std::vector<uint8_t> packed_zeros;

    Weight(int bits, int64_t outputs, int64_t inputs, int64_t group_size)
        : bits(bits), outputs(outputs), inputs(inputs), groups(inputs / group_size) {
        words.resize(static_cast<size_t>(row_blocks() * units() * bits * kLanes));
        packed_scales.resize(static_cast<size_t>(row_blocks() * groups * kLanes));
        packed_zeros.resize(packed_scales.size());
        for (int64_t row = 0; row < outputs; ++row) {
            for (int64_t group = 0; group < groups; ++group) add_parameters(row, group);
            for (int64_t column = 0; column < inputs; ++column) add_code(row, column);
        }
    }

    int64_t row_blocks() const { return (outputs + kLanes - 1) / kLanes; }
    int64_t units() const { return (inputs + kUnitColumns - 1) / kUnitColumns; }

    void add_parameters(int64_t row, int64_t group) {
        const auto place = static_cast<size_t>((row / kLanes * groups + group) * kLanes + row % kLanes);
        const c10::Half scale(0.001f + 0.02f * static_cast<float>(integer(1000)) / 1000.0f);
        scales.push_back(scale);
        packed_scales[place] = scale.x;
        zeros.push_back(static_cast<uint8_t>(integer(1 << bits)));
        packed_zeros[place] = zeros.back();
    }

    void add_code(int64_t row, int64_t column) {
        const auto code = static_cast<uint32_t>(integer(1 << bits));
        const auto parameters = static_cast<size_t>(row * groups + column / (inputs / groups));
        dense.push_back((static_cast<int>(code) - zeros[parameters]) * static_cast<double>(scales[parameters]));
        const int i = static_cast<int>(column % kUnitColumns), fields = 32 / bits;
        uint32_t* unit = words.data() + (row / kLanes * units() + column / kUnitColumns) * bits * kLanes + row % kLanes;
        if (bits == 3) {
            add_three_bits(unit, code, i / 16, i % 16 / 4, i % 4);
        } else {
            unit[i / fields * kLanes] |= code << (bits * (i % fields));
        }
    }

    // Code `place` of the four in a byte of a half.
    static void add_three_bits(uint32_t* unit, uint32_t code, int half, int byte, int place) {
        uint32_t &own = unit[half * kLanes], &both = unit[2 * kLanes];
        if (place < 2) own |= code << (8 * byte + 3 * place);
        if (place == 2) both |= code << (8 * byte + 4 * half);
        if (place == 3) {
            own |= (code & 3) << (8 * byte + 6);
            both |= (code >> 2) << (8 * byte + 4 * half + 3);
        }
    }

    PackedWeight packed() const {
        return {words.data(), packed_scales.data(), packed_zeros.data(), bits, outputs, inputs, row_blocks(), units(),
                groups,       inputs / groups};
    }

    std::string name() const {
        return std::to_string(bits) + " bits, " + std::to_string(outputs) + " x " + std::to_string(inputs) + " in " +
               std::to_string(groups) + " groups";
    }
};

// `few`: the kernels of few rows, otherwise those of many in this mode.
struct Call {
    bool few;
    Mode mode;
    int64_t rows;

    int digits(Float dtype) const { return dtype == Float::kFloat32 ? 4 : rows % 3 == 0 ? 3 : 2; }

    std::string name() const {
        return std::to_string(rows) + (few ? " few rows" : mode == Mode::kExact ? " rows, exact" : " rows, int8");
    }
};

Array multiply(const Kernels& kernels, const Call& call, const Weight& weight, const Array& input, const Array* bias) {
    static Scratch scratch;
    const PackedWeight packed = weight.packed();
    const InputRows rows{input.data(), input.dtype(), call.rows};
    Array result(input.dtype(), call.rows * weight.outputs);
    const OutputRows output{result.data(), input.dtype(), weight.outputs, bias ? bias->data() : nullptr};
    // In two parts, as threads would.
    const int64_t row = call.rows / 2, block = packed.row_blocks / 2;
    if (call.few) {
        const FixedPointRows fixed = fixed_point_rows(packed, rows, call.digits(input.dtype()), kernels, scratch);
        kernels.prepare(packed, rows, fixed, 0, row);
        kernels.prepare(packed, rows, fixed, row, call.rows);
        kernels.multiply(packed, fixed, output, 0, block);
        kernels.multiply(packed, fixed, output, block, packed.row_blocks);
    } else {
        const ActivationTiles tiles = activation_tiles(packed, rows, call.mode, kernels, scratch);
        kernels.prepare_tiles(packed, rows, tiles, 0, row);
        kernels.prepare_tiles(packed, rows, tiles, row, call.rows);
        kernels.multiply_tiles(packed, tiles, output, 0, block);
        kernels.multiply_tiles(packed, tiles, output, block, packed.row_blocks);
    }
    return result;
}

std::vector<double> product(const Weight& weight, const Array& input, const Array* bias, int64_t rows) {
    const std::vector<double> values = values_of(input);
    std::vector<double> result;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t out = 0; out < weight.outputs; ++out) {
            double sum = bias ? (*bias)[out] : 0.0;
            const double *left = &values[static_cast<size_t>(row * weight.inputs)],
                         *right = &weight.dense[static_cast<size_t>(out * weight.inputs)];
            for (int64_t column = 0; column < weight.inputs; ++column) sum += left[column] * right[column];
            result.push_back(sum);
        }
    }
    return result;
}

void test_products(const Call& call, const Weight& weight, Float dtype, bool with_bias) {
    Array input = Array::random(dtype, call.rows * weight.inputs);
    const Array bias = Array::random(dtype, weight.outputs);
    const bool int8 = !call.few && call.mode == Mode::kInt8;
    for (int64_t i = 0; int8 && i < input.count(); i += 1 + integer(150)) input.set(i, 40.0f * input[i]);
    const std::vector<double> expected = product(weight, input, with_bias ? &bias : nullptr, call.rows);
    const Array plain = multiply(portable_kernels, call, weight, input, with_bias ? &bias : nullptr);
    const double bound = int8 ? 1e-2 : tolerance(dtype);
    const std::string what = weight.name() + ", " + call.name() + ", " + name_of(dtype);
    check_close(plain, expected, bound, "portable, " + what);
    for (const std::string& name : capabilities()) {
        set_capability(name);
        const Array result = multiply(kernels(), call, weight, input, with_bias ? &bias : nullptr);
        check(result == plain, name + " differs from portable: " + what);
    }
}

void test_dense(const Weight& weight, Float dtype) {
    const PackedWeight packed = weight.packed();
    Array expected(dtype, weight.outputs * weight.inputs);
    for (int64_t i = 0; i < expected.count(); ++i) {
        expected.set(i, static_cast<float>(weight.dense[static_cast<size_t>(i)]));
    }
    for (const std::string& name : capabilities()) {
        set_capability(name);
        Array dense(dtype, expected.count());
        kernels().dequantize(packed, dense.data(), dtype, 0, packed.row_blocks);
        check(dense == expected, name + ", dense, " + weight.name() + ", " + name_of(dtype));
    }
}

// Rows with values that are not finite, with large, tiny and no values beside plain ones.
void test_strange_values(const Call& call, Float dtype) {
    const Weight weight(4, 20, 320, 80);
    Array input = Array::random(dtype, call.rows * weight.inputs);
    const Array clean = multiply(portable_kernels, call, weight, input, nullptr);
    input.set(10, NAN);
    input.set((call.rows - 1) * weight.inputs + 200, INFINITY);
    for (int64_t i = 0; i < weight.inputs; ++i) {
        const float factors[] = {1e4f, 1e-6f, 0.0f, 1e-30f};
        input.set(weight.inputs + i, gaussian() * factors[i / 80]);
    }
    const Array plain = multiply(portable_kernels, call, weight, input, nullptr);
    for (const std::string& name : capabilities()) {
        set_capability(name);
        const Array result = multiply(kernels(), call, weight, input, nullptr);
        for (int64_t i = 0; i < result.count(); ++i) {
            const int64_t row = i / weight.outputs;
            const std::string what = name + ", row " + std::to_string(row) + " of " + call.name();
            if (row == 0 || row == call.rows - 1) {
                check(!std::isfinite(result[i]), what + " had a value that is not finite");
            } else {
                check(result[i] == (row == 1 ? plain : clean)[i], what + " depends on its neighbours");
            }
        }
    }
}

// The digits of a row of `columns` values, each of which `value` is asked for.
template <class Value>
int digits_of(Float dtype, int64_t columns, const Value& value) {
    const Weight weight(4, 1, columns, columns % 128 == 0 ? 128 : columns);
    Array input(dtype, columns);
    for (int64_t i = 0; i < columns; ++i) input.set(i, value(i));
    return digits_for_row(weight.packed(), {input.data(), dtype, 1}, 0);
}

void test_digits() {
    const auto plain = [](int64_t) { return gaussian(); };
    const auto gated = [](int64_t) { return gaussian() * gaussian(); };
    const auto outlier = [](int64_t i) { return gaussian() * (i == 3 ? 3000.0f : 1.0f); };
    const auto outliers = [](int64_t i) { return gaussian() * (i % 128 % 13 == 3 ? 3000.0f : 1.0f); };  // 10 in 128
    const auto outlier_among_zeros = [](int64_t i) { return i == 3 ? 3000.0f : 0.0f; };
    for (int64_t columns : {100, 1, 1024, 700}) {
        const std::string what = " in a row of " + std::to_string(columns);
        for (Float dtype : {Float::kBFloat16, Float::kFloat16}) {
            const std::string name = name_of(dtype) + what;
            // A magnitude changes nothing: the smallest here is one of fp16's subnormal numbers.
            for (float factor : {1.0f, 1000.0f, 1e-6f}) {
                check(digits_of(dtype, columns, [&](int64_t) { return factor * gaussian(); }) == 2, "plain " + name);
            }
            check(digits_of(dtype, columns, outlier_among_zeros) == 2, "an outlier among zeros, " + name);
            check(digits_of(dtype, columns, [](int64_t) { return 0.0f; }) == 2, "zeros, " + name);
            if (columns == 1) continue;
            check(digits_of(dtype, columns, outlier) == 3, "an outlier, " + name);
            check(digits_of(dtype, columns, outliers) == 3, "outliers, " + name);
        }
        check(digits_of(Float::kBFloat16, columns, gated) == 2, "gated bf16" + what);
        check(digits_of(Float::kFloat32, columns, plain) == 4, "fp32" + what);
    }
}

}  // namespace

void test_linear() {
    test_digits();
    struct Shape {
        int64_t outputs, inputs, group_size;
    };
    constexpr Shape kShapes[] = {{40, 96, 16},   {17, 160, 32},  {33, 192, 48},  {18, 192, 64},
                                 {36, 160, 80},  {20, 384, 128}, {16, 512, 256}, {5, 544, 272},
                                 {33, 100, 100}, {16, 1, 1},     {3, 700, 700},  {260, 1152, 128}};
    constexpr int64_t kManyRows[] = {9, 10, 19, 32, 33, 40};
    for (const Shape& shape : kShapes) {
        const bool large = shape.outputs > 100;  // more than a panel and a slice
        for (int bits : {2, 3, 4, 8}) {
            const Weight weight(bits, shape.outputs, shape.inputs, shape.group_size);
            for (Float dtype : kDtypes) {
                test_dense(weight, dtype);
                // With matrix units, up to 16 rows are few.
                for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16}) {
                    if (large && rows > 1) break;
                    test_products({true, Mode::kExact, rows}, weight, dtype, rows % 2 == 0);
                }
                for (Mode mode : {Mode::kExact, Mode::kInt8}) {
                    const int64_t rows = large ? 9 : kManyRows[integer(6)];
                    test_products({false, mode, rows}, weight, dtype, integer(2) == 0);
                }
            }
        }
    }
    for (Float dtype : kDtypes) {
        for (int64_t rows : {3, 7, 13, 16}) test_strange_values({true, Mode::kExact, rows}, dtype);
        test_strange_values({false, Mode::kExact, 19}, dtype);
        test_strange_values({false, Mode::kInt8, 19}, dtype);
    }
}

}  // namespace test
