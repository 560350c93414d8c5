"""The AWQ search on its own: tensors and functions only."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from autoq.nn import ScaledActivation
from autoq.quantization import awq, search_ops
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.weight import fake_quantize

round_to_3_bits = partial(fake_quantize, bits=3, group_size=32)
group_errors = partial(search_ops.group_errors, bits=3, zero_point=True)


def _data(tokens: int = 400, channels: int = 64, rows: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs with a few loud channels, as real models have, and a weight."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    inputs[:, ::17] *= 30
    return inputs, torch.randn(rows, channels, generator=generator, dtype=torch.float64)


def _direct_error(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    quantized = round_to_3_bits(weight * scale).double() / scale
    return float((inputs @ (quantized - weight).T).square().sum())


def test_output_error_is_the_error_of_the_outputs() -> None:
    inputs, weight = _data()
    difference = round_to_3_bits(weight).double() - weight
    direct = (inputs @ difference.T).square().sum()
    torch.testing.assert_close(awq.output_error(difference, inputs.T @ inputs), direct, rtol=1e-10, atol=0)


@pytest.mark.parametrize("channels", [3, 511, 512, 513, 1300])
def test_output_error_uses_symmetry_rightly(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    factor = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    gram, difference = factor @ factor.T, torch.randn(7, channels, generator=generator, dtype=torch.float64)
    direct = (difference @ gram * difference).sum()
    torch.testing.assert_close(awq.output_error(difference, gram), direct, rtol=1e-10, atol=0)


def test_search_scale_takes_the_best_candidate_by_direct_evaluation() -> None:
    inputs, weight = _data()
    candidates = awq.candidate_scales(inputs.abs().mean(0), awq.weight_magnitude(weight, 32), awq.SCALE_GRID)
    found = awq.search_scale([(weight, round_to_3_bits)], inputs.T @ inputs, candidates)
    errors = [_direct_error(weight, inputs, scale) for scale in candidates]
    assert torch.equal(found, candidates[errors.index(min(errors))])
    assert min(errors) < 0.5 * errors[0], "the loud channels should gain"


def test_search_scale_rounds_every_part_in_its_own_way() -> None:
    inputs, weight = _data(rows=60)
    weight[50:, :8] = 0  # these rows do not care for what is loud to the others
    gram = inputs.T @ inputs
    finely = partial(fake_quantize, bits=8, group_size=32)
    candidates = awq.candidate_scales(inputs.abs().mean(0), awq.weight_magnitude(weight, 32), awq.SCALE_GRID)

    def error(scale: Tensor) -> float:
        parts = ((weight[:50], finely), (weight[50:], round_to_3_bits))
        return sum(float(awq.output_error(rounds(part * scale) / scale - part, gram)) for part, rounds in parts)

    found = awq.search_scale([(weight[:50], finely), (weight[50:], round_to_3_bits)], gram, candidates)
    assert error(found) == min(map(error, candidates))
    # As if all were rounded alike, it is another one.
    for alike in (finely, round_to_3_bits):
        assert not torch.equal(awq.search_scale([(weight, alike)], gram, candidates), found)


def test_tall_weights_are_screened_and_lose_nothing_that_counts() -> None:
    inputs, weight = _data(rows=2000)
    gram = inputs.T @ inputs
    candidates = awq.candidate_scales(inputs.abs().mean(0), awq.weight_magnitude(weight, 32), awq.SCALE_GRID)
    found = awq.search_scale([(weight, round_to_3_bits)], gram, candidates)
    errors = [_direct_error(weight, inputs, scale) for scale in candidates]
    assert _direct_error(weight, inputs, found) <= 1.01 * min(errors)


def test_search_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = _data()
    gram = inputs.T @ inputs
    candidates = awq.candidate_scales(inputs.abs().mean(0), None, awq.SCALE_GRID)
    ranges = awq.search_clip(weight, gram, group_errors, 32)
    found = awq.search_scale([(weight, round_to_3_bits)], gram, candidates)
    monkeypatch.setattr(awq, "_CHUNK", 5 * 64)
    assert torch.equal(awq.search_scale([(weight, round_to_3_bits)], gram, candidates), found)
    assert torch.equal(awq.search_clip(weight, gram, group_errors, 32), ranges)


def test_candidates_are_centred_positive_and_include_no_scale() -> None:
    activation = torch.tensor([0.0, 1e-9, 1.0, 1000.0])
    candidates = awq.candidate_scales(activation, torch.tensor([0.5, 0.1, 0.0, 1.0]), awq.SCALE_GRID)
    assert len(candidates) == 21
    assert torch.equal(candidates[0], torch.ones(4))
    for scale in candidates:
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0))
        assert scale.max() <= 100.1, "a channel that was silent in calibration must not blow up its norm"


def test_tied_channels_share_a_scale() -> None:
    tie = torch.tensor([4, 5, 4, 5, 6, 7, 6, 7])
    activation = torch.rand(8) + 0.1
    for scale in awq.candidate_scales(activation, torch.rand(8) + 0.1, (0.0, 0.5, 0.9), tie):
        assert torch.equal(scale[[0, 1, 4, 5]], scale[[2, 3, 6, 7]])
    free = awq.candidate_scales(activation, None, (0.5,), torch.arange(8))[1]
    torch.testing.assert_close(free, awq.candidate_scales(activation, None, (0.5,))[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fold_makes_up_for_the_rounding_of_the_norm(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(32, dtype=dtype)
    linear = nn.Linear(32, 8, dtype=torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, 0.5, 2)
    before, constant = norm.weight.double() * linear.weight, norm.bias.double() * linear.weight
    scale = torch.rand(32, dtype=torch.float32) * 5 + 0.2
    returned = awq.fold_scale(norm, [linear], scale)
    torch.testing.assert_close(norm.weight.double() * linear.weight, before, rtol=1e-6, atol=0)
    torch.testing.assert_close(returned, scale, rtol=1e-2, atol=0)
    # The bias is rounded once, like any number of its dtype.
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(norm.bias.double() * linear.weight, constant, rtol=tolerance, atol=0)


def test_fold_into_a_scaled_activation() -> None:
    act = ScaledActivation(nn.GELU(), 16, torch.bfloat16)
    linear = nn.Linear(16, 4)
    x = torch.randn(3, 16)
    before = linear(nn.functional.gelu(x))
    awq.fold_scale(act, [linear], torch.rand(16) + 0.5)
    torch.testing.assert_close(linear(act(x)), before, rtol=1e-4, atol=1e-5)


def test_search_clip_takes_the_best_range_of_every_group() -> None:
    inputs, weight = _data(rows=4)
    inputs, weight = inputs.float(), weight.float()
    weight[0, 5] = 12.0  # an outlier worth clipping
    grid = (1.0, 0.8, 0.6)
    round_group = partial(fake_quantize, bits=3, group_size=-1)
    found = awq.search_clip(weight, inputs.T @ inputs, group_errors, 32, grid)
    assert found.shape == (4, 2, 1)
    for row in range(4):
        for group in range(2):
            part = slice(32 * group, 32 * group + 32)
            values, x = weight[row : row + 1, part], inputs[:, part]
            limits = [values.abs().max() * share for share in grid]
            errors = [((round_group(values.clamp(-m, m)) - values) @ x.T).square().sum() for m in limits]
            assert found[row, group, 0] == limits[int(torch.stack(errors).argmin())]
    clipped = awq.clip(weight, found)
    assert (clipped.reshape(4, 2, 32).abs() <= found).all()


@pytest.mark.parametrize("channels", [7, 64, 1500, 2100])
def test_statistics_are_the_gram_matrix_however_they_are_added(channels: int) -> None:
    inputs = torch.randn(90, channels, generator=torch.Generator().manual_seed(channels))
    statistics = InputStatistics(channels)
    for part in (inputs[:40].reshape(4, 10, -1), inputs[40:41], inputs[41:].reshape(7, 7, -1)):
        statistics.add(part)
    statistics.finish()
    exact = inputs.double().T @ inputs.double()
    assert statistics.tokens == 90
    torch.testing.assert_close(statistics.gram.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(statistics.gram, statistics.gram.T)
    torch.testing.assert_close(statistics.mean_absolute, inputs.abs().mean(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_statistics_notice_what_is_not_finite(bad: float) -> None:
    statistics = InputStatistics(8)
    inputs = torch.ones(3, 8)
    inputs[1, 2] = bad
    statistics.add(inputs)
    assert not statistics.finish().is_finite()
