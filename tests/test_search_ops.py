"""The operators of the search and the rounding, on every set of kernels, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from operators import needs_extension
from torch import Tensor

from autoq.quantization import search_ops
from autoq.quantization.weight import fake_quantize

# ---- group_errors ----------------------------------------------------------------------------------------------------


def groups_and_ranges(rows: int, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = torch.randn(rows, groups, size)
    inputs = torch.randn(groups, 4 * size, size)
    low = weights.amin(dim=2, keepdim=True) * torch.rand(rows, groups, 1)
    high = weights.amax(dim=2, keepdim=True) * torch.rand(rows, groups, 1)
    return weights, low.clamp(max=0), high.clamp(min=0), inputs.mT @ inputs


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 128, 208, 256])
@pytest.mark.parametrize(("bits", "zero_point"), [(2, True), (3, True), (4, True), (8, True), (4, False), (2, False)])
def test_group_errors_are_those_in_float64(size: int, bits: int, zero_point: bool, capability: str) -> None:
    for rows, groups in ((1, 1), (7, 3), (100, 2)):
        weights, low, high, gram = groups_and_ranges(rows, groups, size)
        if not zero_point:
            low, high = -high, high
        found = search_ops.group_errors(weights, low, high, gram, bits, zero_point)
        # The weights are rounded in fp32 either way: in fp64 some would fall to another code.
        rounded = fake_quantize(weights.clamp(low, high).flatten(0, 1), bits, -1, zero_point).reshape(weights.shape)
        difference = rounded.double() - weights.double()
        exact = torch.einsum("rgi,gij,rgj->rg", difference, gram.double(), difference).unsqueeze(2)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_group_errors_of_other_sizes_and_dtypes_are_torchs() -> None:
    for size, dtype in ((24, torch.float32), (272, torch.float32), (32, torch.float64)):
        weights, low, high, gram = (tensor.to(dtype) for tensor in groups_and_ranges(3, 2, size))
        found = search_ops.group_errors(weights, low, high, gram, 4, True)
        assert found.shape == (3, 2, 1)
        assert found.dtype == dtype
        reference = search_ops._reference_group_errors(weights, low.squeeze(2), high.squeeze(2), gram, 4, True)
        assert torch.equal(found.squeeze(2), reference)


def test_ranges_of_zeros_and_of_tiny_values() -> None:
    weights, _, _, gram = groups_and_ranges(2, 2, 32)
    weights[0, 0], weights[1, 1] = 0.0, weights[1, 1] * 1e-8
    ends = torch.zeros(2, 2, 1)
    arguments = weights, ends, ends, gram, 4, True
    expected = torch.einsum("rgi,gij,rgj->rg", weights, gram, weights).unsqueeze(2)  # all is cut to zero
    torch.testing.assert_close(search_ops.group_errors(*arguments), expected, rtol=1e-5, atol=1e-12)


@needs_extension
def test_group_errors_check_their_arguments() -> None:
    weights, low, high, gram = groups_and_ranges(2, 3, 32)
    with pytest.raises(RuntimeError, match=r"gram must have the shape \[3, 32, 32\]"):
        search_ops.group_errors(weights, low, high, gram[:2], 4, True)
    with pytest.raises(RuntimeError, match=r"low and high must have the shape \[2, 3\]"):
        search_ops.group_errors(weights, low[:1], high, gram, 4, True)
    torch.library.opcheck(
        torch.ops.autoq.group_errors.default, (weights, low.squeeze(2), high.squeeze(2), gram, 4, True)
    )


# ---- channels, one after the other -----------------------------------------------------------------------------------


def channels(count: int, outputs: int, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, codes, the scales and zeros of groups, and a Gram matrix that ties the channels to each other."""
    values, scales = torch.randn(count, outputs), 0.1 + 0.2 * torch.rand(groups, outputs)
    codes = torch.randint(0, 2**bits, (count, outputs)).float()
    zeros = torch.randint(0, 2**bits, (groups, outputs)).float()
    inputs = torch.randn(4 * count, count) @ (torch.eye(count) + 0.3 * torch.randn(count, count))
    return values, codes, scales, zeros, inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(count)


# Channels, outputs, groups; a descent takes 128 channels at a time.
SIZES = [(1, 1, 1), (5, 16, 5), (24, 33, 3), (128, 100, 2), (300, 20, 3)]


def assert_nearest(codes: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    """All in float64: each code is that of the nearest value, but where rounding to fp32 tips a tie."""
    wanted = (values / scales + zeros).clamp(0, 2**bits - 1)
    assert torch.equal(codes, codes.round())
    assert (codes - wanted).abs().max() <= 0.501


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("count", "outputs", "groups"), SIZES)
def test_compensation_follows_its_definition(count: int, outputs: int, groups: int, bits: int, capability: str) -> None:
    values, _, scales, zeros, gram = channels(count, outputs, bits, groups)
    factors = torch.linalg.cholesky(gram, upper=True) / 4
    start = 0.1 * torch.randn_like(values)
    codes, found, pulls = torch.full_like(values, -1), values.clone(), start.clone()
    search_ops.compensate_channels(found, pulls, codes, scales, zeros, factors, bits)
    exact, moved = values.double(), start.double()
    for channel in range(count):
        code = codes[channel].double()
        scale, zero = (part[channel * groups // count].double() for part in (scales, zeros))
        moved[channel] += exact[channel]
        assert_nearest(code, moved[channel], scale, zero, bits)
        for error in (exact, moved):
            error[channel] -= (code - zero) * scale
        moved[channel + 1 :] += torch.outer(factors[channel, channel + 1 :].double(), exact[channel])
    assert (found - exact).norm() < 1e-5 * values.norm()
    assert (pulls - moved).norm() < 1e-5 * (values.norm() + moved.norm())  # one code takes most of a value away


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("count", "outputs", "groups"), SIZES)
def test_descent_follows_its_definition(count: int, outputs: int, groups: int, bits: int, capability: str) -> None:
    values, before, scales, zeros, gram = channels(count, outputs, bits, groups)
    group_of = torch.arange(count) * groups // count
    exact = gram.double() @ ((before - zeros[group_of]) * scales[group_of] - values).double()
    gradient, codes = exact.float(), before.clone()
    search_ops.descend_channels(gradient, codes, scales, zeros, gram, bits)
    for channel in range(count):
        code, old = (part[channel].double() for part in (codes, before))
        scale, zero = (part[channel * groups // count].double() for part in (scales, zeros))
        wanted = (old - zero) * scale - exact[channel] / gram[channel, channel].double()
        assert_nearest(code, wanted, scale, zero, bits)
        exact += torch.outer(gram[channel].double(), (code - old) * scale)
    assert (gradient - exact).norm() < 1e-5 * exact.norm() + 1e-4


def test_a_descent_that_changes_few_codes(capability: str) -> None:
    """As after compensated rounding, where most channels cost no more than a look."""
    values, codes, scales, zeros, gram = channels(260, 50, 4, 2)
    group_of = torch.arange(260) * 2 // 260
    codes = (values / scales[group_of] + zeros[group_of]).round().clamp(0, 15)
    changed = 1.0
    while changed > 0.05:
        gradient = gram @ ((codes - zeros[group_of]) * scales[group_of] - values)
        before = codes.clone()
        search_ops.descend_channels(gradient, codes, scales, zeros, gram, 4)
        changed = float((codes != before).float().mean())
    assert changed > 0
    exact = gram.double() @ ((codes - zeros[group_of]) * scales[group_of] - values).double()
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


def test_channels_in_float64_are_torchs() -> None:
    values, codes, scales, zeros, gram = (part.double() for part in channels(20, 10, 3, 4))
    single = [part.float() for part in (values, codes, scales, zeros, gram)]
    for work in ((values, codes, scales, zeros, gram), single):
        search_ops.compensate_channels(work[0], torch.zeros_like(work[0]), *work[1:], bits=3)
        search_ops.descend_channels(*work, bits=3)
    assert (codes != single[1]).float().mean() < 0.05
    assert codes.dtype == torch.float64


def test_values_far_from_the_grid_go_to_its_ends(capability: str) -> None:
    values = torch.tensor([1e30, -1e30, 1e8, -1e8, 0.0]).repeat(1, 4)
    codes, ones, zeros = torch.empty_like(values), torch.ones_like(values), torch.full_like(values, 3.0)
    search_ops.compensate_channels(values, torch.zeros_like(values), codes, ones, zeros, torch.ones(1, 1), 4)
    assert codes[0, :5].tolist() == [15, 0, 15, 0, 3]


@needs_extension
def test_channels_check_their_arguments() -> None:
    values, codes, scales, zeros, gram = channels(8, 32, 4, 2)
    compensate, descend = torch.ops.autoq.compensate_channels.default, torch.ops.autoq.descend_channels.default
    for operator, first in ((compensate, (values, values.clone())), (descend, (values,))):
        for arguments, complaint in (
            ((codes, scales, zeros, gram[:4], 4), r"factors must be contiguous float32 \[8, 8\] on the CPU"),
            ((codes[:, :16], scales, zeros, gram, 4), r"codes must be contiguous float32 \[8, 16\]"),
            ((codes, scales, zeros[:, :16], gram, 4), r"zeros must be contiguous float32 \[2, 32\]"),
            ((codes, torch.ones(3, 32), torch.ones(3, 32), gram, 4), "groups that divide 8 channels"),
            ((codes, scales, zeros, gram, 9), "bits is 9; it must be 2 to 8"),
        ):
            with pytest.raises(RuntimeError, match=complaint):
                operator(*first, *arguments)
        torch.library.opcheck(operator, (*first, codes, scales, zeros, gram, 4))
    for name, operator, first in (
        ("values", compensate, (values[:4], values)),
        ("pulls", compensate, (values, values.double())),
        ("gradient", descend, (values.T,)),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} must be contiguous float32 \[8, 32\]"):
            operator(*first, codes, scales, zeros, gram, 4)
