"""What the default effort adds to AWQ and compensated rounding: a better grid, and better codes on it.

All of it lowers `tr(D H D^T)`, the error of a weight that is off by `D` on inputs with the Gram matrix `H = X X^T`:

- `search_range` moves the two ends of each group's range on their own, where AWQ's clip cuts both alike.
- `descend` goes over the codes again, each the best while the others stay: coordinate descent, as in QuantEase (Behdin
  et al., 2023, arXiv:2309.01885). Compensated rounding chooses a code before it knows those behind it; this one knows.
- `refit_scales` solves for the scales that suit the codes, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autoq.quantization.awq import GroupErrors, diagonal_blocks, row_chunks
from autoq.quantization.search_ops import descend_channels
from autoq.quantization.weight import QuantizedWeight, dequantize

# Where an end of the range is tried, as shares of where it is.
RANGE_GRID = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
_ENDS = ("low", "high", "low", "high")
# Ranges that are tried for each group: where it starts, shrunk, and with each end moved.
RANGE_TRIES = 1 + sum(share < 1 for share in RANGE_GRID) + len(_ENDS) * len(RANGE_GRID)

# Rounds of a descent and a refit. The first lowers the error by 3 or 4 hundredths, the second by 1 or 2, later ones by
# less than one each.
ROUNDS = 2


class Ranges(NamedTuple):
    """The values `low <= 0 <= high` between which each group is rounded, `[out, groups, 1]`."""

    low: Tensor
    high: Tensor

    def clamp(self, weight: Tensor) -> Tensor:
        """The weight `[out, in]` with each group cut to its range."""
        return weight.reshape(*self.low.shape[:2], -1).clamp(self.low, self.high).reshape(weight.shape)


def search_range(
    weight: Tensor, gram: Tensor, group_errors: GroupErrors, limits: Tensor, grid: Sequence[float] = RANGE_GRID
) -> Ranges:
    """The range of each group with the smallest error of the group's own output, from where AWQ's clip left it.

    First both ends of the range shrink alike, then each end is moved on its own, twice.

    weight: fp32 or fp64 `[out, in]`; gram: `[in, in]` of its inputs.
    group_errors: as of `awq.search_clip`, of a rounding with a zero point.
    limits: `m` of `awq.search_clip`, `[out, groups, 1]`.
    grid: shares of an end's place to try.
    """
    groups = weight.reshape(*limits.shape[:2], -1)
    blocks = diagonal_blocks(gram, groups.shape[1])
    chunks = (row_chunks(whole, weight.shape[1], small=True) for whole in (groups, limits))
    found = [_search_rows(part, blocks, group_errors, limit, grid) for part, limit in zip(*chunks, strict=True)]
    return Ranges(torch.cat([part.low for part in found]), torch.cat([part.high for part in found]))


def _search_rows(
    groups: Tensor, gram: Tensor, group_errors: GroupErrors, limits: Tensor, grid: Sequence[float]
) -> Ranges:
    """groups: `[rows, groups, size]`; gram: `[groups, size, size]`."""

    def error(tried: Ranges) -> Tensor:
        return group_errors(groups, tried.low, tried.high, gram)

    # A range beyond the weights rounds as the one that ends with them.
    whole = Ranges(groups.amin(dim=2, keepdim=True).clamp(max=0), groups.amax(dim=2, keepdim=True).clamp(min=0))
    best = Ranges(torch.maximum(whole.low, -limits), torch.minimum(whole.high, limits))
    smallest = error(best)
    both = [Ranges(whole.low * share, whole.high * share) for share in grid if share < 1]
    for tried in both:
        best, smallest = _better(best, smallest, tried, error(tried))
    for end in _ENDS:
        start = best
        for share in grid:
            tried = start._replace(**{end: getattr(start, end) * share})
            best, smallest = _better(best, smallest, tried, error(tried))
    return best


def _better(best: Ranges, smallest: Tensor, tried: Ranges, error: Tensor) -> tuple[Ranges, Tensor]:
    """Group by group the range with the smaller error, and that error."""
    better = error < smallest
    ranges = Ranges(torch.where(better, tried.low, best.low), torch.where(better, tried.high, best.high))
    return ranges, torch.where(better, error, smallest)


def refine(weight: Tensor, gram: Tensor, quantized: QuantizedWeight, gradient: Tensor | None = None) -> QuantizedWeight:
    """Codes and scales with a smaller error `tr(D H D^T)`, by turns of `descend` and `refit_scales`.

    weight: fp32 `[out, in]`; gram: fp32 `[in, in]` of its inputs, its diagonal positive and of a size near one.
    quantized: what to start from; its zero points stay.
    gradient: as of `descend`.
    """
    for _ in range(ROUNDS):
        quantized, gradient = descend(weight, gram, quantized, gradient)
        quantized = refit_scales(gradient.T, gram, quantized)
        gradient = None
    return quantized


def descend(
    weight: Tensor, gram: Tensor, quantized: QuantizedWeight, gradient: Tensor | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """One pass over the codes, each set to the best of its values while all others of its row stay.

    weight: fp32 `[out, in]`; gram: fp32 `[in, in]`, its diagonal positive. The error does not grow.
    gradient: half of the error's, `H D^T`, fp32 `[in, out]`, if it is known; becomes that of what is returned, which
        comes with it.
    """
    if gradient is None:
        gradient = gram @ (dequantize(quantized, weight.dtype) - weight).T
    # One row for each input channel, so that every step works on contiguous memory.
    scales = quantized.scales.T.to(weight.dtype).contiguous()
    zeros = quantized.explicit_zeros().T.to(weight.dtype).contiguous()
    codes = quantized.codes.T.to(weight.dtype).contiguous()
    descend_channels(gradient, codes, scales, zeros, gram, quantized.bits)
    return quantized._replace(codes=codes.T.to(torch.uint8).contiguous()), gradient


def refit_scales(gradient: Tensor, gram: Tensor, quantized: QuantizedWeight) -> QuantizedWeight:
    """The scales with the smallest error for the codes as they are; those of a row together, in closed form.

    gradient: half of the error's gradient as the scales are, `D H`, fp32 or fp64 `[out, in]`; gram: `[in, in]`, in its
    dtype. A scale that would leave half to twice its value stays what it is, and so do those of a row whose error the
    rounding to fp16 would raise.
    """
    steps = dequantize(quantized._replace(scales=torch.ones_like(quantized.scales)), gradient.dtype)
    columns = max(quantized.scales.shape[1] ** 2, gram.shape[0])  # of the largest thing made for a row
    parts = zip(*(row_chunks(whole, columns) for whole in (gradient, steps, quantized.scales)), strict=True)
    return quantized._replace(scales=torch.cat([_refit_rows(part, gram, step, scale) for part, step, scale in parts]))


def _refit_rows(gradient: Tensor, gram: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """steps: what the codes stand for in units of their scale, `[rows, in]`; scales: `[rows, groups]`."""
    rows, count = scales.shape
    steps = steps.reshape(rows, count, -1)
    size = steps.shape[2]
    # Scales that change by c change a row's error by c^T A c + 2 b^T c.
    quadratic = gradient.new_empty(rows, count, count)
    for group in range(count):
        # By symmetry the groups from this one on tell of all.
        across = steps[:, group] @ gram[group * size : (group + 1) * size, group * size :]
        products = torch.linalg.vecdot(across.reshape(rows, -1, size), steps[:, group:])
        quadratic[:, group, group:] = products
        quadratic[:, group:, group] = products
    linear = torch.linalg.vecdot(steps, gradient.reshape(steps.shape))

    def change(by: Tensor) -> Tensor:
        """Of the error."""
        return (by * (torch.linalg.vecdot(quadratic, by.unsqueeze(1)) + 2 * linear)).sum(dim=1, keepdim=True)

    # A group whose codes are all zero has no say in the error; the diagonal keeps its equation solvable.
    diagonal = quadratic.diagonal(dim1=1, dim2=2)
    damping = 1e-6 * diagonal.mean(dim=1) + torch.finfo(gradient.dtype).tiny
    damped = quadratic + torch.diag_embed(damping.unsqueeze(1).expand_as(diagonal))
    before = scales.to(gradient.dtype)
    solved = before - torch.linalg.solve_ex(damped, linear).result
    sane = (solved > before / 2) & (solved < before * 2)
    after = torch.where(sane, solved, before).to(scales.dtype).to(gradient.dtype)
    return torch.where(change(after - before) < 0, after, before).to(scales.dtype)
