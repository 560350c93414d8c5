"""Error-compensated rounding against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoq.quantization import compensation
from autoq.quantization.awq import output_error
from autoq.quantization.compensation import Compensator
from autoq.quantization.weight import QuantizedWeight, dequantize, quantize


def _data(channels: int = 64, rows: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    mixing = torch.randn(channels, channels, generator=generator)
    inputs = torch.randn(500, channels, generator=generator) @ mixing
    return inputs.T @ inputs, torch.randn(rows, channels, generator=generator)


def _by_definition(weight: Tensor, gram: Tensor, grid: QuantizedWeight) -> Tensor:
    """Optimal brain quantization in float64: after each channel the rest is solved for anew, by least squares."""
    gram = gram.double()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    remaining = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    target, values = weight.double(), weight.double().clone()
    while remaining:
        channel = remaining.pop(0)
        group = channel // grid.group_size
        scale, zero = grid.scales[:, group].double(), grid.explicit_zeros()[:, group].double()
        code = (values[:, channel] / scale).round().add(zero).clamp(0, 2**grid.bits - 1)
        values[:, channel] = (code - zero) * scale
        if remaining:
            done = [k for k in range(len(gram)) if k not in remaining]
            error = (values - target)[:, done]
            # The rest that minimises the output error, given what is fixed.
            shift = torch.linalg.solve(gram[remaining][:, remaining], gram[remaining][:, done] @ error.T).T
            values[:, remaining] = target[:, remaining] - shift
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_it_is_the_stepwise_optimum(bits: int, zero_point: bool) -> None:
    gram, weight = _data(32, 6)
    grid = quantize(weight, bits, 16, zero_point)
    found = dequantize(Compensator(gram).round(weight, grid)[0], torch.float64)
    expected = _by_definition(weight, gram, grid)
    # A value on the edge between two codes may fall either way in fp32, and what follows compensates for it.
    same = (found - expected).abs().amax(dim=1) < 1e-5
    assert same.float().mean() >= 0.8
    assert output_error(found - weight, gram.double()) <= 1.05 * output_error(expected - weight, gram.double())


@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_it_beats_rounding_to_nearest_and_keeps_the_grid(group_size: int) -> None:
    gram, weight = _data()
    nearest = quantize(weight, 3, group_size)
    found, _ = Compensator(gram).round(weight, nearest)
    assert torch.equal(found.scales, nearest.scales)
    assert torch.equal(found.zeros, nearest.zeros)
    assert found.codes.dtype == torch.uint8
    assert found.codes.max() <= 7
    before, after = (output_error(dequantize(entry) - weight, gram) for entry in (nearest, found))
    assert after < 0.6 * before


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _data(96)
    grid = quantize(weight, 4, 32)
    whole = Compensator(gram).round(weight, grid)[0].codes
    monkeypatch.setattr(compensation, "BLOCK", 7)
    in_blocks = Compensator(gram).round(weight, grid)[0].codes
    assert (whole != in_blocks).float().mean() < 0.02  # fp32 sums in another order


def test_it_ends_with_the_gradient_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "_PANEL", 40)  # more than one, and a part
    gram, weight = _data(96)
    few = torch.randn(3, 96)
    for inputs in (gram, few.T @ few, torch.zeros(96, 96)):
        compensator = Compensator(inputs)
        found, residual = compensator.round(weight, quantize(weight, 4, 32))
        damped = compensator.damped(inputs)
        expected = damped.double() @ (dequantize(found, torch.float64) - weight.double()).T
        assert (compensator.gradient(residual) - expected).norm() < 1e-4 * expected.norm()


def test_inputs_that_say_little() -> None:
    _, weight = _data()
    grid = quantize(weight, 4, 16)
    assert torch.equal(Compensator(torch.zeros(64, 64)).round(weight, grid)[0].codes, grid.codes)
    few = torch.randn(3, 64)
    for gram in (few.T @ few, torch.full((64, 64), 1e30), torch.eye(64) * 3e38, torch.eye(64) * 1e-38):
        compensator = Compensator(gram)
        found, _ = compensator.round(weight, grid)
        damped = compensator.damped(gram).double()
        after, before = (output_error(dequantize(entry, torch.float64) - weight, damped) for entry in (found, grid))
        assert after <= before * (1 + 1e-6)


def test_channels_without_correlation_are_rounded_to_nearest() -> None:
    _, weight = _data()
    grid = quantize(weight, 4, 16)
    assert torch.equal(Compensator(torch.diag(torch.rand(64) + 0.1)).round(weight, grid)[0].codes, grid.codes)
