"""AWQ: activation-aware weight quantization (Lin et al., MLSys 2024, arXiv:2306.00978).

A linear's error under quantization is `|Q(W s)(X / s) - W X|^2 = tr(D H D^T)` with `D = Q(W s) / s - W` and the Gram
matrix `H = X X^T` of its inputs. Everything here is algebra on `H`: the paper's search for the scale `s` per input
channel, and its search for the range to clip weights to. This file knows tensors and how to round them, through the
`fake_quantize` function it is given; it knows no model, no format and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

FakeQuantize = Callable[[Tensor], Tensor]
# The errors `[rows, groups, 1]` of groups `[rows, groups, size]`, each cut to a range from `low` to `high`
# (`[rows, groups, 1]`) and rounded, on inputs with the Gram matrices `[groups, size, size]`.
GroupErrors = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The paper's grids: 20 ratios between weight and activation magnitude, 10 ranges down to half the largest weight.
SCALE_GRID = tuple(i / 20 for i in range(20))
CLIP_GRID = tuple(1 - i / 20 for i in range(10))

# A channel's magnitude counts as at least this share of the largest: a channel that was never active in calibration
# would otherwise get a scale that overflows the previous operation's weight and ruins the channel once it is used.
_SMALLEST_MAGNITUDE = 1e-4

# Rows that choose the finalists among the candidate scales, how many those are, and the rows that decide among them:
# a taller weight's choice does not change with the rows left out, but takes several times as long.
SCREENED_ROWS = 512
FINALISTS = 3
DECIDING_ROWS = 2048

# Columns of the Gram matrix multiplied at once, so that symmetry spares almost half of the work.
_PANEL = 512

# Rows are multiplied with a Gram matrix in chunks of about this many weights, and searched group by group in smaller
# ones, whose intermediate tensors stay in the cache.
_CHUNK = 1 << 22
_SMALL_CHUNK = 1 << 20


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """`tr(D H D^T)`: the squared error of `D X` summed over tokens and outputs.

    difference: `[out, in]`; gram: symmetric `[in, in]`. Returns a scalar.
    """
    error = difference.new_zeros(())
    for start in range(0, gram.shape[0], _PANEL):
        # By symmetry the part of H below the diagonal adds what the part above adds.
        panel = slice(start, start + _PANEL)
        across = difference[:, panel] @ gram[panel, start:]
        error += torch.linalg.vecdot(across[:, :_PANEL], difference[:, panel]).sum()
        error += 2 * torch.linalg.vecdot(across[:, _PANEL:], difference[:, start + _PANEL :]).sum()
    return error


def row_chunks(tensor: Tensor, columns: int, small: bool = False) -> Sequence[Tensor]:
    """A tensor in chunks of rows, as are worked on at once in a weight of so many columns.

    small: for work on each group alone.
    """
    return tensor.split(max(1, (_SMALL_CHUNK if small else _CHUNK) // columns))


def weight_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """Mean over rows of each channel's weights relative to the largest weight of their group, `[in]`."""
    groups = weight.abs().reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    relative = groups / groups.amax(dim=2, keepdim=True).clamp_(min=torch.finfo(groups.dtype).tiny)
    return relative.mean(dim=0).reshape(-1)


def candidate_scales(
    activation: Tensor, weight: Tensor | None, grid: Sequence[float], tie: Tensor | None = None
) -> list[Tensor]:
    """The scales `activation^ratio / weight^(1 - ratio)` for each ratio of the grid, and no scale at all.

    activation: magnitude of each input channel, `[in]`, not negative.
    weight: magnitude of each channel's weights, `[in]`, or None to leave the weights out of it.
    tie: int64 `[in]`; channels with the same number share one scale (their geometric mean).
    """

    def log_magnitude(magnitude: Tensor) -> Tensor:
        largest = magnitude.max().clamp(min=torch.finfo(magnitude.dtype).tiny)
        return (magnitude / largest).clamp(min=_SMALLEST_MAGNITUDE).log()

    log_activation = log_magnitude(activation)
    log_weight = torch.zeros_like(log_activation) if weight is None else log_magnitude(weight)
    candidates = [torch.ones_like(log_activation)]
    for ratio in grid:
        log_scale = ratio * log_activation - (1 - ratio) * log_weight
        if tie is not None:
            sums = torch.zeros(int(tie.max()) + 1, dtype=log_scale.dtype, device=log_scale.device)
            sums = sums.scatter_reduce(0, tie, log_scale, "mean", include_self=False)
            log_scale = sums[tie]
        # Only ratios between channels matter; centred, neither the weights nor the previous operation overflow.
        candidates.append((log_scale - (log_scale.max() + log_scale.min()) / 2).exp())
    return candidates


def search_scale(parts: Sequence[tuple[Tensor, FakeQuantize]], gram: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """The candidate `s` with the smallest error `|Q(W s)(X / s) - W X|^2`; the first one wins a tie.

    Of a tall weight, a sample of the rows chooses a few finalists, which are then compared on many more: neighbouring
    ratios differ by less than the choice of few rows could hide.

    parts: the weights `W` that read the activation, fp32 or fp64 `[out, in]`, those that are rounded alike one above
        the other, each part with what rounds rows `[rows, in]` of it to its quantized grid and back.
    gram: `X X^T`, `[in, in]`, in the weights' dtype.
    candidates: scales `[in]`, positive.
    """
    rows = sum(len(weight) for weight, _ in parts)

    def errors_of(count: int, indices: Sequence[int]) -> dict[int, float]:
        """The errors of candidates on so many rows, each part with its share of them."""
        errors = dict.fromkeys(indices, 0.0)
        for weight, fake_quantize in parts:
            drawn = weight[drawn_rows(weight, -(-count * len(weight) // rows))]
            for index, error in _scale_errors(drawn, gram, fake_quantize, candidates, indices).items():
                errors[index] += error
        return errors

    finalists: Sequence[int] = range(len(candidates))
    if rows >= 2 * SCREENED_ROWS:
        errors = errors_of(SCREENED_ROWS, finalists)
        finalists = sorted(sorted(errors, key=errors.__getitem__)[:FINALISTS])
    errors = errors_of(DECIDING_ROWS, finalists)
    return candidates[min(errors, key=errors.__getitem__)]


def drawn_rows(weight: Tensor, count: int) -> Tensor | slice:
    """An index of `count` rows of a weight, or of all if it has no more; always the same ones.

    Drawn at random: at equal distances they could all be the same few positions of a head.
    """
    if weight.shape[0] <= count:
        return slice(None)
    drawn = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(weight.device)


def _scale_errors(
    weight: Tensor, gram: Tensor, fake_quantize: FakeQuantize, candidates: Sequence[Tensor], indices: Iterable[int]
) -> dict[int, float]:
    """The error of some of the candidates, by index."""
    errors = dict.fromkeys(indices, 0.0)
    for rows in row_chunks(weight, weight.shape[1]):
        for index in errors:
            scale = candidates[index]
            errors[index] += float(output_error(fake_quantize(rows * scale) / scale - rows, gram))
    return errors


def fold_scale(prev: nn.Module, linears: Sequence[nn.Linear], scale: Tensor, rows: Tensor | None = None) -> Tensor:
    """Multiplies the linears' input channels by `scale` and makes the previous operation divide by it.

    prev: a norm, a linear, or a scaled activation (a module that divides its output by its buffer `scales`).
    scale: `[channels]`, positive.
    rows: the output row of a previous linear behind each channel, int64 `[channels]`; None: one to one.
    Returns the scale the linears were multiplied by. It differs from `scale` by the rounding of a norm's weight to
    its dtype, which the linears make up for.
    """
    with torch.no_grad():
        if isinstance(prev, nn.Linear):
            row_scale = scale_by_row(prev.out_features, scale, rows)
            prev.weight.div_(row_scale.to(prev.weight.dtype).unsqueeze(1))
            if prev.bias is not None:
                prev.bias.div_(row_scale.to(prev.bias.dtype))
        elif "scales" in dict(prev.named_buffers(recurse=False)):
            scales = prev.get_buffer("scales")
            before = scales.to(scale.dtype, copy=True)
            scales.copy_(before * scale)
            scale = scales.to(scale.dtype) / before
        else:
            scale = _divide_norm(prev, scale)
        for linear in linears:
            linear.weight.mul_(scale.to(linear.weight.dtype))
    return scale


def scale_by_row(out_features: int, scale: Tensor, rows: Tensor | None) -> Tensor:
    """What each output row of a previous linear is divided by, `[out]`: one for rows that no channel depends on."""
    if rows is None:
        return scale
    return torch.ones(out_features, dtype=scale.dtype, device=scale.device).scatter_(0, rows, scale)


def _divide_norm(norm: nn.Module, scale: Tensor) -> Tensor:
    """Divides a norm's weight and bias by the scale; returns what the stored weight was really divided by."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    before = weight.to(scale.dtype, copy=True)
    weight.copy_(before / scale)
    after = weight.to(scale.dtype)
    divided = torch.where((before != 0) & (after != 0), before / after, scale)
    if bias is not None:
        bias.copy_(bias.to(scale.dtype) / divided)
    return divided


def search_clip(
    weight: Tensor, gram: Tensor, group_errors: GroupErrors, group_size: int, grid: Sequence[float] = CLIP_GRID
) -> Tensor:
    """The range `[-m, m]` each group is best clipped to before rounding, by the error of the group's own output.

    weight: fp32 or fp64 `[out, in]`; gram: `[in, in]` of the inputs of this very weight (after scaling).
    group_errors: what each group's output errs by once it is cut to a range and rounded.
    grid: the shares of the largest weight to try, descending from 1.
    Returns `m` as `[out, groups, 1]`.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    count = weight.shape[1] // size
    blocks = diagonal_blocks(gram, count)
    parts = row_chunks(weight, weight.shape[1], small=True)
    return torch.cat([_search_clip_rows(rows.reshape(-1, count, size), blocks, group_errors, grid) for rows in parts])


def diagonal_blocks(gram: Tensor, count: int) -> Tensor:
    """The Gram matrices of each of `count` groups of channels, `[groups, size, size]`."""
    size = gram.shape[0] // count
    return gram.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _search_clip_rows(groups: Tensor, gram: Tensor, group_errors: GroupErrors, grid: Sequence[float]) -> Tensor:
    """groups: `[rows, groups, size]`; gram: `[groups, size, size]`."""
    largest = groups.abs().amax(dim=2, keepdim=True)
    best_range = largest.clone()
    best_error = torch.full_like(largest, torch.inf)
    for share in grid:
        limit = largest * share
        error = group_errors(groups, -limit, limit, gram)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_range = torch.where(better, limit, best_range)
    return best_range


def clip(weight: Tensor, ranges: Tensor) -> Tensor:
    """The weight `[out, in]` clamped to `[-m, m]` of each of its groups, `m` as from `search_clip`."""
    groups = weight.reshape(*ranges.shape[:2], -1)
    return groups.clamp(-ranges, ranges).reshape(weight.shape)
