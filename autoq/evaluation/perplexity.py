"""Perplexity on a text, and the windows of tokens it and the other measures of quality are taken on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from autoq.errors import ConfigError
from autoq.inputs import context_length

_DEFAULT_LENGTH = 2048

# Logits converted to fp32 at a time, 64 MiB of them: with all of [batch, sequence, vocabulary] a window of 2048
# tokens and a vocabulary of 128 Ki would take 1 GiB for each copy.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class PerplexityResult:
    """value: perplexity, exp of the mean negative log-likelihood (nats) of `tokens` tokens in `windows` windows.

    A model whose logits overflow or are NaN has a value of inf or NaN, so compare it as `value <= limit`.
    """

    value: float
    windows: int
    tokens: int

    def __float__(self) -> float:
        return self.value


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Path | Tensor,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Perplexity of a causal language model on a text.

    The text is tokenized at once, no special token added, and cut into non-overlapping windows of `sequence_length`
    tokens; the remainder is dropped. Counted are tokens 2 to `sequence_length` of each window, each predicted from the
    tokens before it in the window: `exp(sum(nll) / count)`. This is how the tables of GPTQ and AWQ are made. The
    negative log-likelihood is computed in fp32 and summed in fp64.

    model: a transformers causal language model, or a callable with `device` and `config` that returns `.logits`.
    text: the text, the path of a UTF-8 file that holds it, or token ids `[tokens]` or `[1, tokens]` (then tokenizer
        may be None).
    sequence_length: None for the model's context, at most 2048.
    max_windows: windows to evaluate, from the start of the text; None for all.
    progress: show a progress bar on a terminal.

    Raises ConfigError when the text is shorter than a window, or a window longer than the model's context.
    """
    windows = token_windows(model, tokenizer, text, sequence_length, max_windows)
    total = 0.0
    with evaluating(model):
        for batch in window_batches(windows, batch_size, progress, "perplexity"):
            total += negative_log_likelihood(window_logits(model, batch), batch)
    return perplexity_of(total, windows)


def token_windows(
    model: Any, tokenizer: Any, text: str | Path | Tensor, sequence_length: int | None, max_windows: int | None
) -> Tensor:
    """The windows a text is evaluated on, int64 `[windows, sequence_length]` on the CPU; see `perplexity`."""
    length = _window_length(model.config, sequence_length)
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows is {max_windows}; evaluation needs at least 1 window, or None for all")
    ids = _text_ids(tokenizer, text)
    count = ids.numel() // length
    if count == 0:
        raise ConfigError(
            f"the text has {ids.numel()} tokens, fewer than one window of {length}; "
            f"use a longer text or a smaller sequence_length{_path_hint(text)}"
        )
    _check_vocabulary(ids, model.config)
    windows = ids[: count * length].view(count, length)
    return windows if max_windows is None else windows[:max_windows]


def _window_length(config: Any, sequence_length: int | None) -> int:
    context = context_length(config)
    if sequence_length is None:
        return min(context or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if sequence_length < 2:
        raise ConfigError(f"sequence_length is {sequence_length}; a window needs at least 2 tokens to predict one")
    if context is not None and sequence_length > context:
        raise ConfigError(
            f"sequence_length is {sequence_length}, but the model's context is {context} tokens; "
            f"use at most {context}, or None"
        )
    return sequence_length


def _text_ids(tokenizer: Any, text: str | Path | Tensor) -> Tensor:
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.ndim not in (1, 2) or (text.ndim == 2 and text.shape[0] != 1):
            raise ConfigError(
                f"the text is a {text.dtype} tensor of shape {tuple(text.shape)}; "
                "token ids are integers of shape [tokens] or [1, tokens]"
            )
        return text.reshape(-1).to("cpu", torch.int64)
    if isinstance(text, Path):
        text = _read_text(text)
    if not isinstance(text, str):
        raise ConfigError(f"the text is of type {type(text).__name__}; pass a string, a Path or a tensor of token ids")
    if tokenizer is None:
        raise ConfigError("evaluating on a text needs a tokenizer; pass one, or pass token ids")
    # Not verbose: the text is longer than the model's context, that is what the windows are for.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"the text file {path} {'is not a file' if path.exists() else 'does not exist'}; check it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text file {path} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise ConfigError(f"the text file {path} cannot be read: {error.strerror}") from error


def _path_hint(text: str | Path | Tensor) -> str:
    """What to add to an error about a short string: it may be the name of the file that was meant."""
    if not isinstance(text, str) or "\n" in text or len(text) > 1000:
        return ""
    try:
        return f"; to read the file {text}, pass it as a pathlib.Path" if Path(text).is_file() else ""
    except (OSError, ValueError):
        return ""


def _check_vocabulary(ids: Tensor, config: Any) -> None:
    size = getattr(config, "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(size, int) and high >= size):
        raise ConfigError(
            f"the text holds token ids from {low} to {high}, but the model's vocabulary has {size} tokens, "
            "numbered from 0; use the tokenizer that belongs to the model"
        )


def window_batches(windows: Tensor, batch_size: int, progress: bool, title: str) -> Iterable[Tensor]:
    """Batches `[batch, sequence_length]` of windows, under a progress bar where the output is a terminal."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    batches: Iterable[Tensor] = torch.split(windows, batch_size)
    # disable=None: no bar in logs and pipes.
    bar: Iterable[Tensor] = tqdm(batches, desc=title, unit="batch", leave=False, disable=None if progress else True)
    return bar


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Inference mode, with the models in eval mode; every submodule's own mode is restored afterwards."""
    training = [part for model in models for part in module_of(model).modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for part in training:
            part.training = True


def module_of(model: Any) -> nn.Module:
    """The torch module of a model, or of a wrapper that keeps it as `model`."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"the model is of type {type(model).__name__}; a torch module, or a wrapper of one, was expected"
        )
    return module


def window_logits(model: Any, batch: Tensor) -> Tensor:
    """The model's logits `[batch, sequence_length, vocabulary]`, in its own dtype and on its own device."""
    logits: Tensor = model(batch.to(model.device), use_cache=False).logits
    return logits


def logit_chunks(logits: Tensor) -> Iterator[slice]:
    """Cuts `[rows, vocabulary]` into slices of rows small enough to be copied in fp32."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + step) for start in range(0, rows, step))


def negative_log_likelihood(logits: Tensor, batch: Tensor) -> float:
    """Sum over the tokens of a batch of windows, but the first of each, of -log p(token | tokens before), in nats.

    logits: `[batch, sequence_length, vocabulary]`. batch: int64 `[batch, sequence_length]`.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for window_logits, window in zip(logits, batch.to(logits.device), strict=True):
        scores, targets = window_logits[:-1], window[1:]
        for rows in logit_chunks(scores):
            nll = functional.cross_entropy(scores[rows].float(), targets[rows], reduction="none")
            total += nll.double().sum()
    return total.item()


def perplexity_of(total: float, windows: Tensor) -> PerplexityResult:
    """The result for windows `[windows, sequence_length]` whose negative log-likelihoods sum to `total`."""
    count, length = windows.shape
    tokens = count * (length - 1)
    return PerplexityResult(perplexity_of_mean(total / tokens), windows=count, tokens=tokens)


def perplexity_of_mean(mean: float) -> float:
    """The perplexity of a mean negative log-likelihood in nats."""
    # math.exp raises where the result is beyond fp64, some 1e308; a broken model may well get there.
    return math.inf if mean > 709 else math.exp(mean)
