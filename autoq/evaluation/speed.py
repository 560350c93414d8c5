"""How fast a model generates, and how many bytes it takes."""

from __future__ import annotations

import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ConfigError
from autoq.evaluation.perplexity import evaluating, module_of
from autoq.inputs import context_length

# Untimed steps before the timed runs: the first calls allocate memory, choose kernels and fault weights in.
_WARMUP_TOKENS = 4


@dataclass(frozen=True)
class SpeedResult:
    """Medians over repeated runs of a prefill and a greedy decode with a KV cache.

    prefill_seconds: one forward over the prompts, the time to the first token.
    decode_milliseconds: one decode step, which yields one token of each sequence of the batch.
    peak_process_bytes: largest resident memory of the process since it started (None on Windows).
    peak_device_bytes: largest GPU memory of the runs (None on a CPU).
    """

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    prefill_seconds: float
    decode_milliseconds: float
    peak_process_bytes: int | None
    peak_device_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded in a second, of all sequences of the batch."""
        return self.batch_size * 1000 / self.decode_milliseconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read in a second, of all sequences of the batch."""
        return self.batch_size * self.prompt_tokens / self.prefill_seconds


def measure_generation(
    model: Any, prompt_tokens: int = 128, new_tokens: int = 64, batch_size: int = 1, repeats: int = 3
) -> SpeedResult:
    """Times a prefill of random tokens, then greedy decoding with a KV cache, through the model's forward.

    prompt_tokens: length of each of the `batch_size` prompts.
    new_tokens: tokens generated for each: the first by the prefill, the others by a timed step each; at least 2.
    repeats: runs; the median prefill, and the median step of all runs, are reported.

    Raises ConfigError when a count is too small or the model's context too short.
    """
    _check_counts(model, prompt_tokens, new_tokens, batch_size, repeats)
    device = torch.device(model.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), generator=generator).to(device)
    clock = _device_clock(device)
    prefills: list[float] = []
    steps: list[float] = []
    with evaluating(model):
        _timed_generation(model, prompt, min(new_tokens, _WARMUP_TOKENS), clock)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            prefill, *decode = _timed_generation(model, prompt, new_tokens, clock)
            prefills.append(prefill)
            steps.extend(decode)
    return SpeedResult(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        prefill_seconds=statistics.median(prefills),
        decode_milliseconds=statistics.median(steps) * 1000,
        peak_process_bytes=peak_process_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _check_counts(model: Any, prompt_tokens: int, new_tokens: int, batch_size: int, repeats: int) -> None:
    counts = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2)}
    counts |= {"batch_size": (batch_size, 1), "repeats": (repeats, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; measuring generation needs at least {least}")
    context = context_length(model.config)
    if context is not None and prompt_tokens + new_tokens > context:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens exceed the model's context of {context}; "
            "measure fewer"
        )


def _device_clock(device: torch.device) -> Callable[[], float]:
    """Seconds at which all work given to the device so far is done."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def _timed_generation(model: Any, prompt: Tensor, new_tokens: int, clock: Callable[[], float]) -> list[float]:
    """Seconds each of `new_tokens` greedy tokens takes: the prefill, then the decode steps."""
    seconds = []
    ids, cache = prompt, None
    for _ in range(new_tokens):
        start = clock()
        ids, cache = greedy_step(model, ids, cache)
        seconds.append(clock() - start)
    return seconds


def greedy_step(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Feeds `ids` `[batch, tokens]` after what `cache` holds; returns the next ids `[batch, 1]` and the cache.

    cache: the `past_key_values` of the step before, or None at the start.
    """
    # As generate() does: the head is applied to the last position only, where the model can.
    module = module_of(model)
    names = _arguments(type(module).forward)
    inner = getattr(module, "model", None)
    if "input_ids" not in names and isinstance(inner, nn.Module):  # a wrapper passes all of them on
        names = _arguments(type(inner).forward)
    options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    output = model(ids, past_key_values=cache, use_cache=True, **options)
    return output.logits[:, -1:].argmax(dim=-1), output.past_key_values


@functools.cache
def _arguments(function: Callable[..., Any]) -> set[str]:
    """The names of a function's arguments."""
    return set(inspect.signature(function).parameters)


def peak_process_bytes() -> int | None:
    """Largest resident memory of this process since it started, or None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a model; memory that several of them share (tied weights) counts once."""
    module: nn.Module = module_of(model)
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        # On the meta device nothing has an address; tensors that are one object are still found.
        address = tensor.data_ptr() or id(tensor)
        key = (tensor.device, address)
        sizes[key] = max(sizes.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(sizes.values())
