"""Quantizes one block, given what its linears read: searches and folds scales, searches clips, rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoq.architectures import ScaleGroup
from autoq.architectures.base import named_linears
from autoq.config import QuantConfig
from autoq.errors import QuantizationError
from autoq.nn import QuantLinear, ScaledActivation
from autoq.nn.linear import replace_module
from autoq.quantization import awq, refinement, tuning
from autoq.quantization.activations import leaders_of, map_tensors, to_fp32
from autoq.quantization.compensation import Compensator
from autoq.quantization.plan import Plan
from autoq.quantization.report import LinearReport, size_note
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.weight import QuantizedWeight, dequantize, quantize

# How far folded scales may move a block's output, relative to what the block adds to its input: a thousandth, or this
# many roundings of the model's dtype, in which norms keep their weights and biases.
_FOLDING_TOLERANCE = 1e-3
_FOLDING_ROUNDINGS = 8
# Rows of a weight that the errors in the report are measured on; drawn at random where there are more.
REPORTED_ROWS = 2048


@dataclass
class SearchResults:
    """What the AWQ search found, by the full names of modules; on the CPU.

    scales: `[channels]`, for the operation that divides by it and the linears that are multiplied by it.
    clips: `[out, groups, 1]`, the range of each group of a linear whose scale is folded.
    """

    scales: dict[tuple[str, tuple[str, ...]], Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)

    def update(self, other: SearchResults) -> None:
        """Takes over what another search found."""
        self.scales.update(other.scales)
        self.clips.update(other.clips)


@dataclass
class BlockResult:
    """What became of a block: a line for each linear, and what the search found."""

    reports: list[LinearReport]
    search: SearchResults


@dataclass(frozen=True)
class Probe:
    """Some inputs of a block, to see that folding scales does not change what it computes."""

    hidden: Tensor
    keywords: dict[str, Any]


class LinearWork:
    """A linear while its block is worked on: in fp32 whatever the model's dtype, and what was folded into it."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        check_finite(linear.weight, name)
        self.linear = linear
        self.name = name
        self.dtype = linear.weight.dtype
        self.original = linear.weight.detach()
        self.column_scale = torch.ones(linear.in_features, device=linear.weight.device)
        self.row_scale = torch.ones(linear.out_features, device=linear.weight.device)
        self._cast(torch.float32)

    def _cast(self, dtype: torch.dtype) -> None:
        # A copy: the original stays for the report.
        self.linear.weight = nn.Parameter(self.linear.weight.detach().to(dtype, copy=True), requires_grad=False)
        if self.linear.bias is not None:
            self.linear.bias = nn.Parameter(self.linear.bias.detach().to(dtype), requires_grad=False)

    def restore(self) -> None:
        """Back to the model's dtype, for a linear that is not quantized."""
        self._cast(self.dtype)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises QuantizationError unless a weight is finite."""
    if not torch.isfinite(weight).all():
        raise QuantizationError(f"the weight of {name} holds NaN or infinity; check the checkpoint it came from")


class ScaledInputs:
    """The inputs some linears read once their scale is folded, and what rounding needs to know of them.

    Takes over the statistics' Gram matrix and scales it in place: a wide linear's takes a large part of the memory.
    """

    def __init__(self, inputs: InputStatistics, item: LinearWork, compensate: bool) -> None:
        """item: one of the linears."""
        self.tokens = inputs.tokens
        self.gram = inputs.gram.div_(item.column_scale).div_(item.column_scale.unsqueeze(1))
        if not inputs.is_finite():
            raise QuantizationError(
                f"the inputs of {item.name} over their scale are too large for fp32; if the scale comes from a file of "
                "search results, it is not of this model"
            )
        self.compensator = Compensator(self.gram) if compensate else None


def quantize_block(
    block: nn.Module,
    prefix: str,
    statistics: dict[str, InputStatistics],
    plan: Plan,
    probe: Probe | None = None,
    known: SearchResults | None = None,
    batches: Sequence[tuning.Batch] = (),
) -> BlockResult:
    """Searches, folds and rounds one block, and tunes it on the batches, if there are; its quantized linears become
    QuantLinear.

    statistics: of what the linears read, by the leader of those that read the same; emptied.
    probe: inputs to check the folded block with, before anything is rounded.
    known: what an earlier search found, to be applied without a search.
    """
    found = SearchResults()
    work = {leaf: LinearWork(linear, f"{prefix}.{leaf}") for leaf, linear in named_linears(block)}
    with _unchanged(block, prefix, next(iter(work.values())).dtype, probe):
        for group in plan.groups:
            _scale_group(block, prefix, group, statistics, work, plan, known, found)
    order = list(work)
    rounded: dict[str, _Rounded] = {}
    reports = {}
    for leader, leaves in _by_leader(block, plan).items():
        kept = [leaf for leaf in leaves if work[leaf].name in plan.group_sizes]
        read = statistics.pop(leader)
        if kept:
            inputs = ScaledInputs(read, work[kept[0]], plan.config.compensate)
            for leaf in kept:
                weight, clipped = round_linear(work[leaf], inputs, plan, known, found)
                rounded[leaf] = _Rounded(weight, clipped, inputs)
                if not batches:
                    # What is done is dropped at once: in fp32 it is large.
                    reports[leaf] = _finish_linear(block, leaf, work.pop(leaf), rounded.pop(leaf), plan)
            inputs.compensator = None
            del inputs
        del read
    if batches:
        weights = {leaf: (work[leaf].linear.weight.detach(), one.weight) for leaf, one in rounded.items()}
        dtype = next(iter(work.values())).dtype
        for leaf, weight in tuning.tune_block(block, weights, batches, dtype).items():
            reports[leaf] = _finish_linear(block, leaf, work.pop(leaf), rounded[leaf]._replace(weight=weight), plan)
    for leaf, item in work.items():
        item.restore()
        reports[leaf] = LinearReport(item.name, None, None, None, None, 0, plan.left_alone[item.name])
    return BlockResult([reports[leaf] for leaf in order], found)


class _Rounded(NamedTuple):
    """A weight that is rounded, the share of it that was clipped, and the inputs that told how."""

    weight: QuantizedWeight
    clipped: float
    inputs: ScaledInputs


def _finish_linear(block: nn.Module, leaf: str, item: LinearWork, rounded: _Rounded, plan: Plan) -> LinearReport:
    """Puts a quantized linear in the place of what it was made of."""
    replace_module(block, leaf, quantized_linear(item, rounded.weight))
    return report_of(item, rounded.weight, rounded.clipped, rounded.inputs, plan)


def _by_leader(block: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """The linears that read the same, by the one that is observed for them."""
    found: dict[str, list[str]] = {}
    for leaf, leader in leaders_of(block, plan).items():
        found.setdefault(leader, []).append(leaf)
    return found


@contextmanager
def _unchanged(block: nn.Module, prefix: str, dtype: torch.dtype, probe: Probe | None) -> Iterator[None]:
    """Raises QuantizationError if what happens while it is open changes what the block computes in fp32."""
    if probe is None:
        yield
        return
    before = block_output(block, probe)
    yield
    after = block_output(block, probe)
    added = before - probe.hidden.float()
    moved = float((after - before).norm() / added.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if not moved <= max(_FOLDING_TOLERANCE, _FOLDING_ROUNDINGS * torch.finfo(dtype).eps):
        raise QuantizationError(
            f"folding the scales changes the output of {prefix} by {moved:.1%}, where it should not change it: the "
            "block computes something its architecture's description does not say. Quantize with apply_scale=False, "
            "or as a model of a family that fits"
        )


def block_output(block: nn.Module, probe: Probe) -> Tensor:
    """The block's output in fp32, whatever the dtypes of its tensors, which stay as they are."""
    others = [tensor for tensor in chain(block.parameters(), block.buffers()) if tensor.dtype != torch.float32]
    others = [tensor for tensor in others if tensor.is_floating_point()]
    held = [tensor.data for tensor in others]
    try:
        for tensor in others:
            tensor.data = tensor.data.float()
        output = block(probe.hidden.float(), **map_tensors(probe.keywords, to_fp32))
    finally:
        for tensor, data in zip(others, held, strict=True):
            tensor.data = data
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _scale_group(
    block: nn.Module,
    prefix: str,
    group: ScaleGroup,
    statistics: dict[str, InputStatistics],
    work: dict[str, LinearWork],
    plan: Plan,
    known: SearchResults | None,
    found: SearchResults,
) -> None:
    """Searches one group's scale and folds it.

    A group that touches a linear to be left as it is is left as it is: folding would change that linear's weight.
    """
    touched = [leaf for leaf in (group.prev, *group.linears) if leaf in work]
    if any(work[leaf].name not in plan.group_sizes for leaf in touched):
        return
    names = f"{prefix}.{group.prev}", tuple(work[leaf].name for leaf in group.linears)
    if known is not None and names not in known.scales:
        return
    inputs = statistics[group.linears[0]]
    linears = [work[leaf].linear for leaf in group.linears]
    weights = [linear.weight for linear in linears]
    device, channels = weights[0].device, weights[0].shape[1]
    if group.activation:
        act = ScaledActivation(block.get_submodule(group.prev), channels, work[group.linears[0]].dtype)
        replace_module(block, group.prev, act.to(device))
    prev = block.get_submodule(group.prev)
    rows = None if group.rows is None else group.rows(plan.model_config).to(device)
    if known is None:
        magnitude = None
        if plan.config.duo_scaling:
            magnitude = awq.weight_magnitude(torch.cat(weights), plan.group_sizes[names[1][0]])
        candidates = awq.candidate_scales(inputs.mean_absolute, magnitude, awq.SCALE_GRID, rows)
        alike: dict[int, list[str]] = {}  # linears, by their bits
        for leaf in group.linears:
            alike.setdefault(plan.config.bits_for(work[leaf].name), []).append(leaf)
        parts = [
            (torch.cat([work[leaf].linear.weight for leaf in leaves]), plan.fake_quantize(work[leaves[0]].name))
            for leaves in alike.values()
        ]
        scale = awq.search_scale(parts, inputs.gram, candidates)
    else:
        scale = _known_scale(known.scales[names], names, channels, rows).to(device)
    scale = awq.fold_scale(prev, linears, scale, rows)
    found.scales[names] = scale.to("cpu")
    for leaf in group.linears:
        work[leaf].column_scale = scale
    if isinstance(prev, nn.Linear):
        work[group.prev].row_scale = awq.scale_by_row(prev.out_features, scale, rows)


def _known_scale(scale: Tensor, names: tuple[str, tuple[str, ...]], channels: int, rows: Tensor | None) -> Tensor:
    """A scale of an earlier search, if it fits."""
    scale = scale.float().flatten()
    fits = scale.numel() == channels and bool((torch.isfinite(scale) & (scale > 0)).all())
    if not fits:
        raise QuantizationError(
            f"the search results hold a scale for {names[1][0]} that is not {channels} positive numbers; they are not "
            "of this model"
        )
    if rows is not None:
        shared = torch.zeros(int(rows.max()) + 1).scatter_reduce(0, rows.cpu(), scale.cpu(), "amax")[rows.cpu()]
        if not torch.equal(shared, scale.cpu()):
            raise QuantizationError(
                f"the search results scale channels of {names[1][0]} differently that come from one row of {names[0]}; "
                "they are not of this model"
            )
    return scale


def round_linear(
    item: LinearWork, inputs: ScaledInputs, plan: Plan, known: SearchResults | None, found: SearchResults
) -> tuple[QuantizedWeight, float]:
    """Clips and rounds one linear whose scales are folded; the share of its weights that were clipped comes with it."""
    config = plan.config
    weight = item.linear.weight.detach()
    clipped = _clip(weight, item.name, inputs, plan, known, found)
    share = float((clipped != weight).float().mean())
    try:
        quantized = quantize(clipped, config.bits_for(item.name), plan.group_sizes[item.name], config.zero_point)
    except QuantizationError as error:
        raise QuantizationError(f"{item.name}: {error}") from None
    del clipped
    if inputs.compensator is not None:
        quantized, residual = inputs.compensator.round(weight, quantized)
        if config.effort != "fast":
            gradient = inputs.compensator.gradient(residual)
            del residual
            quantized = refinement.refine(weight, inputs.compensator.damped(inputs.gram), quantized, gradient)
    return quantized, share


def quantized_linear(item: LinearWork, weight: QuantizedWeight) -> QuantLinear:
    """The module that takes a linear's place."""
    bias = None if item.linear.bias is None else item.linear.bias.detach().to(item.dtype)
    return QuantLinear.from_weight(weight, bias)


def report_of(
    item: LinearWork, quantized: QuantizedWeight, clipped: float, inputs: ScaledInputs, plan: Plan
) -> LinearReport:
    """What the report says of a linear."""
    group_size, wanted = plan.group_sizes[item.name], plan.wanted_group_size(item.name)
    before, after = _errors(item, quantized, inputs, plan)
    return LinearReport(
        name=item.name,
        bits=quantized.bits,
        group_size=group_size,
        error_before=before,
        error_after=after,
        tokens=inputs.tokens,
        note=size_note(group_size, wanted),
        clipped=clipped,
    )


def _errors(item: LinearWork, quantized: QuantizedWeight, inputs: ScaledInputs, plan: Plan) -> tuple[float, float]:
    """The shares of the output `|W X|^2` that rounding to nearest and the quantized weight err by, on some rows."""
    rows = awq.drawn_rows(item.original, REPORTED_ROWS)
    row_scale = item.row_scale[rows].unsqueeze(1)
    codes, scales, zeros, bits = quantized
    drawn = QuantizedWeight(codes[rows], scales[rows], None if zeros is None else zeros[rows], bits)
    original = item.original[rows].float()
    weight = original * item.column_scale  # all three in the space of the scaled inputs
    nearest = plan.fake_quantize(item.name)(original) * item.column_scale
    searched = dequantize(drawn) * row_scale
    energy = awq.output_error(weight, inputs.gram).clamp(min=torch.finfo(torch.float32).tiny)
    before, after = (awq.output_error(found - weight, inputs.gram) / energy for found in (nearest, searched))
    return float(before), float(after)


def _clip(
    weight: Tensor,
    name: str,
    inputs: ScaledInputs,
    plan: Plan,
    known: SearchResults | None,
    found: SearchResults,
) -> Tensor:
    """The weight within the range its groups are best clipped to."""
    if not plan.config.apply_clip or name.rpartition(".")[2] in plan.architecture.unclipped:
        return weight
    size = plan.group_sizes[name]
    if known is None:
        ranges = awq.search_clip(weight, inputs.gram, plan.group_errors(name), size)
    elif name in known.clips:
        ranges = known.clips[name].to(weight)
    else:
        return weight
    found.clips[name] = ranges.to("cpu")
    return _within(weight, inputs.gram, plan.group_errors(name), ranges, plan.config)


def cut(weight: Tensor, gram: Tensor, group_errors: awq.GroupErrors, group_size: int, config: QuantConfig) -> Tensor:
    """The weight `[out, in]` within the ranges its groups are best cut to.

    gram, group_errors: as for `awq.search_clip`.
    """
    return _within(weight, gram, group_errors, awq.search_clip(weight, gram, group_errors, group_size), config)


def _within(weight: Tensor, gram: Tensor, group_errors: awq.GroupErrors, ranges: Tensor, config: QuantConfig) -> Tensor:
    """The weight within the ranges of AWQ, or what more effort makes of them."""
    if config.effort != "fast" and config.zero_point:
        return refinement.search_range(weight, gram, group_errors, ranges).clamp(weight)
    return awq.clip(weight, ranges)
