"""How much each linear matters: what quantizing it alone, to each width, does to its block's output."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from autoq.architectures.base import named_linears
from autoq.formats import LinearSpec
from autoq.nn.spread import bring
from autoq.quantization.activations import Activations, device_of
from autoq.quantization.plan import Plan
from autoq.quantization.search import Probe, block_output
from autoq.quantization.weight import SUPPORTED_BITS, fake_quantize


@torch.no_grad()
def measure_sensitivities(
    model: PreTrainedModel, plan: Plan, samples: Sequence[Tensor], progress: bool = False
) -> dict[str, dict[int, float]]:
    """For every linear of the blocks that is to be quantized and every width, the mean over tokens of
    `|change of the block's output|^2 / |output|^2` when that linear alone is rounded to the nearest.

    The output is what flows on to the next block, residual and all, so that errors of different blocks and linears
    compare. A full-precision block is in memory one at a time, in fp32.
    """
    activations = Activations(model, plan, samples)
    found: dict[str, dict[int, float]] = {}
    blocks = plan.architecture.decoder_blocks(model)
    for index, block in enumerate(tqdm(blocks, desc="measuring", unit="block", disable=not progress)):
        prefix = plan.block_name(index)
        working = copy.deepcopy(block)
        bring(working, prefix)
        working.float()
        device = device_of(working)
        probes = [
            Probe(activations.states.read(number).to(device), activations.keywords(number, device))
            for number in range(len(activations.batches))
        ]
        expected = [block_output(working, probe) for probe in probes]
        for leaf, linear in named_linears(working):
            if f"{prefix}.{leaf}" in plan.specs:
                found[f"{prefix}.{leaf}"] = _by_width(working, linear, plan.specs[f"{prefix}.{leaf}"], probes, expected)
        activations.advance(block)
    return found


def _by_width(
    block: nn.Module, linear: nn.Linear, spec: LinearSpec, probes: Sequence[Probe], expected: Sequence[Tensor]
) -> dict[int, float]:
    own = linear.weight.data
    errors = {}
    for bits in SUPPORTED_BITS:
        linear.weight.data = fake_quantize(own, bits, spec.group_size, spec.zero_point)
        changes = [_change(block_output(block, probe), output) for probe, output in zip(probes, expected, strict=True)]
        errors[bits] = float(torch.cat(changes).mean())
    linear.weight.data = own
    return errors


def _change(found: Tensor, expected: Tensor) -> Tensor:
    """The relative squared change of each token's hidden state."""
    energy = expected.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((found - expected).square().sum(dim=-1) / energy).flatten()
