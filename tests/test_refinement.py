"""Ranges, codes and scales refined on a Gram matrix, against brute force."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from autoq.quantization import awq, refinement, search_ops
from autoq.quantization.compensation import Compensator
from autoq.quantization.refinement import descend, refine, refit_scales, search_range
from autoq.quantization.weight import QuantizedWeight, dequantize, fake_quantize, quantize


def _data(channels: int = 64, rows: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    mixing = torch.randn(channels, channels, generator=generator)
    inputs = torch.randn(500, channels, generator=generator) @ mixing
    return inputs.T @ inputs / 500, torch.randn(rows, channels, generator=generator)


def _row_errors(weight: Tensor, gram: Tensor, quantized: QuantizedWeight) -> Tensor:
    difference = dequantize(quantized, torch.float64) - weight.double()
    return ((difference @ gram.double()) * difference).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_a_descent_lowers_every_row_and_ends_where_no_single_code_can(
    bits: int, zero_point: bool, group_size: int
) -> None:
    gram, weight = _data(32, 6)
    found = quantize(weight, bits, group_size, zero_point)
    for _ in range(50):
        before = found
        found, gradient = descend(weight, gram, found)
        assert (_row_errors(weight, gram, found) <= _row_errors(weight, gram, before) * (1 + 1e-4)).all()
        torch.testing.assert_close(gradient.T, (dequantize(found) - weight) @ gram, rtol=1e-3, atol=1e-2)
    error = _row_errors(weight, gram, found)
    for channel, code in itertools.product(range(32), range(min(2**bits, 16))):
        codes = found.codes.clone()
        codes[:, channel] = code
        assert (_row_errors(weight, gram, found._replace(codes=codes)) >= error * (1 - 1e-4)).all()


def test_a_descent_is_that_of_the_reference_in_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _data(288)
    start = quantize(weight, 4, 32)
    found = descend(weight, gram, start)[0].codes
    monkeypatch.setattr(search_ops, "_DESCENT_BLOCK", 7)
    monkeypatch.setattr(refinement, "descend_channels", search_ops._reference_descend)
    assert (found != descend(weight, gram, start)[0].codes).float().mean() < 0.02  # fp32 sums in another order


@pytest.mark.parametrize("zero_point", [True, False])
def test_refitted_scales_are_the_least_squares_solution(zero_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight = _data(32, 5)
    start = quantize(weight, 4, 8, zero_point)
    start = start._replace(scales=start.scales.double())  # no rounding of the result
    gradient = (dequantize(start, torch.float64) - weight.double()) @ gram.double()
    found = refit_scales(gradient, gram.double(), start)
    factor = torch.linalg.cholesky(gram.double())  # |D factor|^2 = tr(D H D^T)
    for row in range(5):
        steps = (start.codes[row].double() - start.explicit_zeros()[row].double().repeat_interleave(8))[:, None]
        columns = torch.block_diag(*steps.reshape(4, 8, 1))
        exact = torch.linalg.lstsq(factor.T @ columns, factor.T @ weight[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(found.scales[row], exact, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(awq, "_CHUNK", 64)
    torch.testing.assert_close(refit_scales(gradient, gram.double(), start).scales, found.scales)


def test_refinement_gains_on_compensated_rounding() -> None:
    gram, weight = _data()
    compensator = Compensator(gram)
    start, residual = compensator.round(weight, quantize(weight, 3, 32))
    found = refine(weight, compensator.damped(gram), start, compensator.gradient(residual))
    assert torch.equal(found.zeros, start.zeros)
    assert found.scales.dtype == torch.float16
    assert (found.codes.dtype, int(found.codes.max())) == (torch.uint8, 7)
    assert _row_errors(weight, gram, found).sum() < 0.9 * _row_errors(weight, gram, start).sum()
    anew = refine(weight, compensator.damped(gram), start)
    assert (anew.codes != found.codes).float().mean() < 0.02  # fp32 sums in another order


def test_inputs_that_say_little() -> None:
    _, weight = _data()
    few = torch.randn(3, 64)
    for gram in (torch.zeros(64, 64), few.T @ few, torch.eye(64) * 3e38, torch.eye(64) * 1e-38):
        compensator = Compensator(gram)
        damped = compensator.damped(gram)
        start, residual = compensator.round(weight, quantize(weight, 4, 16))
        found = refine(weight, damped, start, compensator.gradient(residual))
        before, after = (_row_errors(weight, damped, entry) for entry in (start, found))
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < 0.99 * before.sum()  # at least the scales gain
    empty = torch.zeros(2, 64)
    assert torch.equal(dequantize(refine(empty, torch.eye(64), quantize(empty, 4, 16))), empty)


def test_each_end_of_a_range_is_moved_on_its_own() -> None:
    gram, weight = _data()
    weight = torch.where(weight > 0, weight.square(), weight)  # the upper tail is longer
    errors = partial(search_ops.group_errors, bits=3, zero_point=True)
    limits = awq.search_clip(weight, gram, errors, 16)
    ranges = search_range(weight, gram, errors, limits)
    assert (ranges.low <= 0).all()
    assert (ranges.high >= 0).all()

    def group_errors(clipped: Tensor) -> Tensor:
        difference = (fake_quantize(clipped, 3, 16) - weight).reshape(-1, 4, 16)
        blocks = torch.stack([gram[i : i + 16, i : i + 16] for i in range(0, 64, 16)])
        return torch.einsum("rgi,gij,rgj->rg", difference, blocks, difference)

    alike, apart = group_errors(awq.clip(weight, limits)), group_errors(ranges.clamp(weight))
    assert (apart <= alike * (1 + 1e-4)).all()
    assert apart.sum() < 0.97 * alike.sum()
