"""How far a quantized model's predictions are from those of the full-precision model.

Perplexity may stay while a model's answers change; the KL divergence sees every change of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq.errors import ConfigError
from autoq.evaluation.perplexity import (
    PerplexityResult,
    evaluating,
    logit_chunks,
    negative_log_likelihood,
    perplexity_of,
    token_windows,
    window_batches,
    window_logits,
)


@dataclass(frozen=True)
class DivergenceResult:
    """value: mean KL(reference || model) in nats over `positions` positions in `windows` windows.

    top1_agreement: share of the positions, 0 to 1, where both models find the same token the most likely.
    A model whose logits are NaN has a value of NaN, so compare it as `value <= limit`.
    """

    value: float
    top1_agreement: float
    windows: int
    positions: int

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Comparison:
    """Quality of a quantized model beside its reference, both on the same windows."""

    reference: PerplexityResult
    model: PerplexityResult
    divergence: DivergenceResult


def kl_divergence(
    reference: Any,
    model: Any,
    tokenizer: Any,
    text: str | Path | Tensor,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> DivergenceResult:
    """Mean KL(reference || model) in nats over all positions of the windows of a text.

    Arguments, windows and errors are those of `perplexity`. The models may be on different devices.
    """
    return compare(reference, model, tokenizer, text, sequence_length, max_windows, batch_size, progress).divergence


def compare(
    reference: Any,
    model: Any,
    tokenizer: Any,
    text: str | Path | Tensor,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Comparison:
    """Perplexity of both models and the divergence between them, in one pass over a text.

    Arguments, windows and errors are those of `perplexity`. The models may be on different devices.
    """
    windows = token_windows(reference, tokenizer, text, sequence_length, max_windows)
    reference_nll = model_nll = divergence = 0.0
    agreeing = 0
    with evaluating(reference, model):
        for batch in window_batches(windows, batch_size, progress, "comparing"):
            expected = window_logits(reference, batch)
            found = window_logits(model, batch).to(expected.device)
            _check_shapes(expected, found)
            reference_nll += negative_log_likelihood(expected, batch)
            model_nll += negative_log_likelihood(found, batch)
            batch_divergence, batch_agreeing = divergence_of_logits(expected.flatten(0, 1), found.flatten(0, 1))
            divergence += batch_divergence
            agreeing += batch_agreeing
    positions = windows.numel()
    result = DivergenceResult(divergence / positions, agreeing / positions, windows.shape[0], positions)
    return Comparison(perplexity_of(reference_nll, windows), perplexity_of(model_nll, windows), result)


def divergence_of_logits(expected: Tensor, found: Tensor) -> tuple[float, int]:
    """Sum of the KL divergences, and number of equal top tokens, over the rows of two logits `[rows, vocabulary]`."""
    divergence = torch.zeros((), dtype=torch.float64, device=expected.device)
    agreeing = torch.zeros((), dtype=torch.int64, device=expected.device)
    for rows in logit_chunks(expected):
        log_p = torch.log_softmax(expected[rows].float(), dim=-1)
        log_q = torch.log_softmax(found[rows].float(), dim=-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64).sum()
        agreeing += (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()
    return divergence.item(), int(agreeing.item())


def _check_shapes(expected: Tensor, found: Tensor) -> None:
    if expected.shape != found.shape:
        raise ConfigError(
            f"the models have vocabularies of {expected.shape[-1]} and {found.shape[-1]} tokens; "
            "a divergence is defined between models of the same vocabulary only"
        )
