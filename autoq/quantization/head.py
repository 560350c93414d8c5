"""Quantizes the output head, with what the blocks made of the calibration data as its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.config import LM_HEAD
from autoq.nn import QuantEmbedding, QuantLinear
from autoq.nn.spread import bring, hand_over, in_memory, is_offloaded
from autoq.quantization.activations import Activations, check_statistics, device_of, observe_head
from autoq.quantization.plan import Plan, head_of
from autoq.quantization.ranks import Ranks
from autoq.quantization.report import LinearReport
from autoq.quantization.search import (
    LinearWork,
    ScaledInputs,
    SearchResults,
    quantized_linear,
    report_of,
    round_linear,
)
from autoq.quantization.sources import StatisticsSource
from autoq.quantization.statistics import InputStatistics


def share_head(
    model: PreTrainedModel, plan: Plan, embeddings: QuantEmbedding, tokens: int
) -> tuple[QuantLinear, LinearReport]:
    """A head that is tied to the embeddings with their codes, and its line of the report.

    tokens: of the calibration, for the report.
    """
    head, spec = head_of(model), embeddings.spec
    with in_memory(head, LM_HEAD):
        bias = None if head.bias is None else head.bias.detach().clone()
    quantized = QuantLinear(spec, embeddings.packed(), bias)
    hand_over(head, quantized)
    size = plan.group_sizes[LM_HEAD]
    return quantized, LinearReport(LM_HEAD, spec.bits, size, None, None, tokens, "tied to the embeddings")


def quantize_head(
    model: PreTrainedModel,
    plan: Plan,
    activations: Activations,
    source: StatisticsSource,
    ranks: Ranks,
    device: torch.device | None,
    known: SearchResults | None,
    found: SearchResults,
) -> tuple[QuantLinear, LinearReport]:
    """The quantized head and its line of the report; the model keeps its own.

    activations: the calibration samples, through all blocks. device: where the work is done; None: where the head is.
    known: results of an earlier search to apply; found: gets those of this one.
    """
    head = head_of(model)
    home = device_of(head)
    if is_offloaded(head):
        bring(head, LM_HEAD)
        head.to(home)
    device = device or home
    statistics = _statistics(model, head, plan, activations, source, device)
    tensors: dict[str, Tensor] = {}

    def work() -> LinearReport:
        check_statistics({LM_HEAD: statistics})
        item = LinearWork(_copy(head, device), LM_HEAD)
        inputs = ScaledInputs(statistics, item, plan.config.compensate)
        weight, clipped = round_linear(item, inputs, plan, known, found)
        tensors.update(quantized_linear(item, weight).state_dict())
        return report_of(item, weight, clipped, inputs, plan)

    line = ranks.alone(work)
    quantized = QuantLinear.empty(plan.specs[LM_HEAD], head.bias)
    quantized.load_state_dict(ranks.send(tensors, 0, home), strict=True, assign=True)
    hand_over(head, quantized)
    return quantized, line


def _statistics(
    model: PreTrainedModel,
    head: nn.Linear,
    plan: Plan,
    activations: Activations,
    source: StatisticsSource,
    device: torch.device,
) -> InputStatistics:
    """Of all processes' samples at the first; the others' are spent."""
    if not source.collects:
        return source.stored(LM_HEAD, device)[LM_HEAD]
    statistics = observe_head(model, head, activations, plan, device)
    source.gather(LM_HEAD, {LM_HEAD: statistics}, owner=0)
    return statistics


def _copy(head: nn.Linear, device: torch.device) -> nn.Linear:
    """A linear to work on: its weight may be the embeddings' too."""
    work = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    work.weight = nn.Parameter(head.weight.detach().to(device), requires_grad=False)
    work.bias = None if head.bias is None else nn.Parameter(head.bias.detach().to(device), requires_grad=False)
    return work
