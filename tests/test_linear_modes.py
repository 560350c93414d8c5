"""The modes of `linear`, which differ where there are many rows: their precision, and that it is all that differs."""

from __future__ import annotations

import itertools

import pytest
import torch
from operators import (
    BITS,
    CAPABILITIES,
    DTYPES,
    EXTENSION,
    TOLERANCE,
    exact_linear,
    make_input,
    make_weight,
    needs_extension,
    relative_error,
    run_linear,
)
from torch import Tensor
from torch.nn import functional

from autoq import ops
from autoq.nn import QuantLinear
from autoq.packed import pack
from autoq.quantization.weight import QuantizedWeight, dequantize, quantize

MODES = ops.MODES
MANY = 17  # from so many rows on the mode counts, whatever the instruction set

# (out_features, in_features, group_size): every kind of group, with outputs and columns that fill no tile.
SHAPES = [
    (40, 96, 16),
    (17, 160, 32),
    (50, 192, 48),
    (33, 192, 64),
    (70, 160, 80),
    (272, 640, 128),
    (20, 768, 256),
    (18, 1088, 544),
    (33, 100, -1),
    (16, 1, -1),
    (5, 2100, -1),
]


def bound(mode: str, dtype: torch.dtype) -> float:
    return 8e-3 if mode == "int8" and EXTENSION is not None else TOLERANCE[dtype]


def every_capability(input: Tensor, weight: QuantizedWeight, bias: Tensor | None, mode: str) -> list[Tensor]:
    """The result of each set of kernels."""
    packed, results = pack(weight), []
    if EXTENSION is None:
        return [run_linear(input, weight, bias, mode)]
    before = EXTENSION.cpu_capability()
    for name in CAPABILITIES:
        EXTENSION.set_cpu_capability(name)
        results.append(ops.linear(input, packed, bias, weight.bits, weight.codes.shape[0], mode))
    EXTENSION.set_cpu_capability(before)
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_instruction_sets_agree_on_many_rows(bits: int, dtype: torch.dtype, mode: str) -> None:
    for (out_features, in_features, group_size), rows in zip(SHAPES, itertools.cycle((17, 20, 33, 50)), strict=False):
        weight = make_weight(out_features, in_features, bits, group_size)
        input, bias = make_input(rows, in_features, dtype=dtype), make_input(out_features, dtype=dtype, seed=2)
        results = every_capability(input, weight, bias, mode)
        assert relative_error(results[0], exact_linear(input, weight, bias)) < bound(mode, dtype)
        for name, result in zip(CAPABILITIES, results, strict=True):
            assert torch.equal(result, results[0]), (name, out_features, in_features, group_size, rows)


@needs_extension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_among_many_does_not_depend_on_the_others(dtype: torch.dtype, mode: str, capability: str) -> None:
    weight, input = make_weight(50, 320, 4, 64), make_input(70, 320, dtype=dtype)
    together = run_linear(input, weight, mode=mode)
    for begin, end in [(0, 17), (3, 20), (40, 70), (5, 69)]:
        assert torch.equal(run_linear(input[begin:end], weight, mode=mode), together[begin:end])


@needs_extension
def test_the_mode_leaves_few_rows_alone(capability: str) -> None:
    weight, input = make_weight(50, 320, 4, 64), make_input(MANY, 320)
    assert torch.equal(run_linear(input[:8], weight, mode="int8"), run_linear(input[:8], weight, mode="exact"))
    assert not torch.equal(run_linear(input, weight, mode="int8"), run_linear(input, weight, mode="exact"))


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_nothing_for_many_rows(mode: str) -> None:
    weight, input = make_weight(600, 512, 4, 128), make_input(40, 512, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_linear(input, weight, mode=mode))
    torch.set_num_threads(before)
    if EXTENSION is not None:
        assert all(torch.equal(result, results[0]) for result in results)


def gaussian_with_outliers(rows: int, columns: int, channels: int, factor: float) -> Tensor:
    """Gaussian values, those of some channels `factor` times larger, as language models have them."""
    input = make_input(rows, columns)
    chosen = torch.randperm(columns, generator=torch.Generator().manual_seed(3))[:channels]
    input[:, chosen] *= factor
    return input.bfloat16()


DATA = {
    "gaussian": (0, 1, 5.4e-3),
    "few outliers": (4, 20, 5e-3),
    "one outlier": (1, 100, 2.8e-3),
    "outliers in most groups": (16, 50, 1.8e-3),
    "outliers in most blocks": (32, 30, 2.8e-3),
}


@needs_extension
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, 256, -1])
@pytest.mark.parametrize("data", DATA)
def test_precision(data: str, group_size: int, bits: int) -> None:
    """Exact is closer than bf16 arithmetic on the weight rounded to bf16; int8 stays within what it promises."""
    channels, factor, int8_bound = DATA[data]
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(256, 2048, generator=generator), bits, group_size)
    input = gaussian_with_outliers(64, 2048, channels, factor)
    expected = exact_linear(input, weight)
    dense = functional.linear(input, dequantize(weight, torch.float32).bfloat16())
    assert relative_error(run_linear(input, weight), expected) < relative_error(dense, expected)
    # The rounding to integers itself, without that of the result to bf16.
    assert relative_error(run_linear(input.float(), weight, mode="int8"), expected) < int8_bound


def with_outliers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows with and without outliers, in channels and anywhere, also more of them in a block than are taken out."""
    input = make_input(rows, columns)
    input[::3, 5::64] *= 50
    input[1::4] *= torch.where(torch.rand(columns, generator=torch.Generator().manual_seed(4)) < 0.05, 200.0, 1.0)
    input[2, : columns // 2 : 5] *= 100
    return input.to(dtype)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_instruction_sets_agree_on_outliers(bits: int, dtype: torch.dtype) -> None:
    for (out_features, in_features, group_size), rows in zip(SHAPES, itertools.cycle((17, 20, 33, 50)), strict=False):
        weight = make_weight(out_features, in_features, bits, group_size)
        input, bias = with_outliers(rows, in_features, dtype), make_input(out_features, dtype=dtype, seed=2)
        results = every_capability(input, weight, bias, "int8")
        assert relative_error(results[0], exact_linear(input, weight, bias)) < bound("int8", dtype)
        for name, result in zip(CAPABILITIES, results, strict=True):
            assert torch.equal(result, results[0]), (name, out_features, in_features, group_size, rows)


@needs_extension
def test_outliers_of_a_row_are_its_own(capability: str) -> None:
    weight, input = make_weight(300, 640, 4, 128), with_outliers(70, 640, torch.bfloat16)
    together = run_linear(input, weight, mode="int8")
    for begin, end in [(0, 17), (3, 20), (40, 70)]:
        assert torch.equal(run_linear(input[begin:end], weight, mode="int8"), together[begin:end])
    input[1:] = make_input(69, 640, seed=5)
    assert torch.equal(run_linear(input, weight, mode="int8")[0], together[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-25, 1e-10, 1e10, 1e28])
def test_any_magnitude_in_many_rows(magnitude: float, mode: str) -> None:
    weight = make_weight(20, 256, 4, 64)
    for dtype in (torch.float32, torch.bfloat16):
        input = (make_input(20, 256) * magnitude).to(dtype)
        results = every_capability(input, weight, None, mode)
        assert relative_error(results[0], exact_linear(input, weight)) < bound(mode, dtype)
        assert all(torch.equal(result, results[0]) for result in results)


@needs_extension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_row_of_many(dtype: torch.dtype, mode: str, capability: str) -> None:
    weight, input = make_weight(20, 80, 4, 16), make_input(20, 80, dtype=dtype)
    clean = run_linear(input, weight, mode=mode)
    input[0, 10], input[19, 70] = float("nan"), float("inf")
    result = run_linear(input, weight, mode=mode)
    assert result[0].isnan().all()
    assert not result[19].isfinite().any()
    assert torch.equal(result[1:19], clean[1:19])


def test_a_linear_layer_has_a_mode() -> None:
    weight = make_weight(40, 96, 4, 32)
    layer, input = QuantLinear.from_weight(weight), make_input(20, 96)
    assert layer.mode == "exact"
    assert torch.equal(layer(input), run_linear(input, weight))
    layer.mode = "int8"
    assert torch.equal(layer(input), run_linear(input, weight, mode="int8"))
