"""The quantization arithmetic against float64 and against what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoq.errors import QuantizationError
from autoq.quantization.weight import SUPPORTED_BITS, QuantizedWeight, dequantize, fake_quantize, quantize

each_setting = pytest.mark.parametrize("bits", SUPPORTED_BITS)
each_range = pytest.mark.parametrize("zero_point", [True, False])


def _weight(rows: int = 5, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@each_setting
@each_range
@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_codes_are_the_nearest_of_the_stored_grid(bits: int, zero_point: bool, group_size: int) -> None:
    weight = _weight()
    quantized = quantize(weight, bits, group_size, zero_point)
    size = 64 if group_size == -1 else group_size
    assert quantized.codes.shape == weight.shape
    assert quantized.scales.shape == (5, 64 // size)
    assert quantized.group_size == size
    assert (quantized.zeros is None) == (not zero_point)
    # Every code the row's grid offers, in float64: none is nearer than the one chosen.
    levels = torch.arange(2**bits, dtype=torch.float64)
    grid = (levels - quantized.explicit_zeros().double().unsqueeze(2)) * quantized.scales.double().unsqueeze(2)
    distances = (weight.double().reshape(5, -1, size, 1) - grid.unsqueeze(2)).abs()
    chosen = (dequantize(quantized, torch.float64) - weight.double()).abs().reshape(5, -1, size)
    scale = quantized.scales.double().unsqueeze(2)
    assert ((chosen - distances.amin(dim=3)) / scale).max() < 1e-5


@each_setting
@each_range
def test_fake_quantize_is_quantize_and_back(bits: int, zero_point: bool) -> None:
    weight = _weight(7, 96, seed=1) * torch.logspace(-3, 3, 7).unsqueeze(1)
    expected = dequantize(quantize(weight, bits, 32, zero_point))
    torch.testing.assert_close(fake_quantize(weight, bits, 32, zero_point), expected, rtol=0, atol=0)


def test_quantizing_what_is_on_the_grid_changes_nothing() -> None:
    once = dequantize(quantize(_weight(), 4, 16))
    torch.testing.assert_close(fake_quantize(once, 4, 16), once, rtol=1e-3, atol=1e-3)


def test_symmetric_means_the_zero_point_is_in_the_middle() -> None:
    quantized = quantize(_weight(), 4, 32, zero_point=False)
    assert quantized.zeros is None
    assert (quantized.explicit_zeros() == 8).all()
    largest = _weight().reshape(5, 2, 32).abs().amax(dim=2)
    torch.testing.assert_close(quantized.scales.float(), largest / 7, rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [10.0, -10.0])
def test_groups_of_one_sign_keep_their_size(offset: float) -> None:
    """The range includes zero, so a zero point exists; without that such weights collapse."""
    weight = torch.rand(3, 32) + offset
    quantized = quantize(weight, 4, 32)
    error = (dequantize(quantized) - weight).abs().max()
    assert error <= quantized.scales.float().max() * 0.51


def test_zeros_stay_zero_and_constants_survive() -> None:
    weight = torch.zeros(2, 32)
    weight[1] = 0.5
    result = dequantize(quantize(weight, 3, 32))
    assert (result[0] == 0).all()
    torch.testing.assert_close(result[1], weight[1], rtol=1e-3, atol=0)


def test_tiny_weights_get_a_scale_fp16_can_hold() -> None:
    quantized = quantize(torch.full((1, 16), 1e-9), 4, 16)
    assert (quantized.scales > 0).all()


def test_rounding_to_a_dtype_happens_once() -> None:
    quantized = quantize(_weight(), 8, 16)
    exact = dequantize(quantized, torch.float64)
    torch.testing.assert_close(dequantize(quantized).double(), exact, rtol=1e-7, atol=0)
    assert torch.equal(dequantize(quantized, torch.float16), dequantize(quantized).to(torch.float16))
    assert torch.equal(dequantize(quantized, torch.bfloat16), dequantize(quantized).to(torch.bfloat16))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e7])
def test_weights_that_cannot_be_quantized(bad: float) -> None:
    weight = _weight()
    weight[2, 3] = bad
    with pytest.raises(QuantizationError, match=r"\(5, 64\).*(NaN or infinite|too large)"):
        quantize(weight, 4, 16)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(QuantizationError, match="64 input features cannot be cut into groups of 48"):
        quantize(_weight(), 4, 48)


def test_the_canonical_weight_knows_its_group_size() -> None:
    codes = torch.zeros(2, 12, dtype=torch.uint8)
    assert QuantizedWeight(codes, torch.ones(2, 3, dtype=torch.float16), None, 4).group_size == 4
