"""Quantizes token embeddings: a row is looked up, not multiplied, so that its own error is all that counts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from autoq.config import EMBEDDINGS, QuantConfig
from autoq.formats import LinearSpec
from autoq.nn import QuantEmbedding
from autoq.nn.spread import hand_over, in_memory
from autoq.quantization import awq, refinement
from autoq.quantization.activations import device_of
from autoq.quantization.plan import Plan, embeddings_of
from autoq.quantization.ranks import Ranks
from autoq.quantization.report import LinearReport, size_note
from autoq.quantization.search import check_finite, cut
from autoq.quantization.search_ops import group_errors
from autoq.quantization.weight import QuantizedWeight, dequantize, fake_quantize, quantize


def quantize_embeddings(
    model: PreTrainedModel, plan: Plan, ranks: Ranks, device: torch.device | None, tokens: int
) -> tuple[QuantEmbedding, LinearReport]:
    """The quantized embeddings and their line of the report, where errors are shares of `|W|^2`; the model keeps its
    own.

    device: where the work is done; None: where they are. tokens: of the calibration, for the report.
    """
    name, embeddings = embeddings_of(model)
    home, dtype, spec, config = device_of(embeddings), embeddings.weight.dtype, plan.embeddings, plan.config
    assert spec is not None
    tensors: dict[str, Tensor] = {}

    def work() -> LinearReport:
        with in_memory(embeddings, name):
            weight = embeddings.weight.detach()
        check_finite(weight, name)
        sums = torch.zeros(3, dtype=torch.float64)  # of the squared errors before and after, and of the weights
        parts = []
        for rows in awq.row_chunks(weight, spec.in_features):
            rows = rows.to(device or home).float()
            nearest = fake_quantize(rows, spec.bits, spec.group_size, spec.zero_point)
            parts.append(round_rows(rows, spec, config))
            errors = nearest - rows, dequantize(parts[-1]) - rows, rows
            sums += torch.stack([error.square().sum() for error in errors]).double().cpu()
        before, after, energy = sums.tolist()
        energy = energy or 1.0
        zeros = torch.cat([part.explicit_zeros() for part in parts]) if spec.zero_point else None
        codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
        quantized = QuantEmbedding.from_weight(QuantizedWeight(codes, scales, zeros, spec.bits), dtype)
        tensors.update(quantized.state_dict())
        size, wanted = config.group_size_for(EMBEDDINGS, spec.in_features), config.embedding_group_size
        note = size_note(size, wanted)
        return LinearReport(name, spec.bits, size, before / energy, after / energy, tokens, note)

    line = ranks.alone(work)
    quantized = QuantEmbedding.empty(spec, dtype)
    quantized.load_state_dict(ranks.send(tensors, 0, home), strict=True, assign=True)
    hand_over(embeddings, quantized)
    return quantized, line


def round_rows(rows: Tensor, spec: LinearSpec, config: QuantConfig) -> QuantizedWeight:
    """Rounds rows of embeddings, fp32 `[rows, embedding_dim]`, with the ranges and scales that lose the least."""
    groups = rows.reshape(-1, spec.group_size)
    # As if every channel were alike and independent: then a group's error is what it loses itself.
    gram = torch.eye(spec.group_size, device=rows.device)
    errors = partial(group_errors, bits=spec.bits, zero_point=spec.zero_point)
    clipped = cut(groups, gram, errors, -1, config) if config.apply_clip else groups
    found = quantize(clipped, spec.bits, -1, spec.zero_point)
    if config.compensate and config.effort != "fast":
        found = refinement.refine(groups, gram, found)
    return QuantizedWeight(
        found.codes.reshape(rows.shape),
        found.scales.reshape(len(rows), -1),
        None if found.zeros is None else found.zeros.reshape(len(rows), -1),
        spec.bits,
    )
