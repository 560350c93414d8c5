"""What the driver asks of an engine that runs a whole model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from peers.worker import peak_memory, reset_peak_memory

# Untimed steps before the timed ones: the first calls allocate memory, choose kernels and fault weights in.
_WARMUP = 2


class ModelWorker(ABC):
    """An engine with a model: prepared for a case once, it decodes the same tokens in every round."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The packages that matter to the figures."""

    @abstractmethod
    def _open(self, path: str, **options: Any) -> int | None:
        """See `load`."""

    @abstractmethod
    def _logits(self, tokens: list[int]) -> np.ndarray:
        """fp32 `[tokens, vocabulary]`."""

    @abstractmethod
    def _fill(self, batch: int, depth: int, room: int, threads: int) -> None:
        """Makes `batch` sequences with `depth` tokens in their caches and space for `room` more."""

    @abstractmethod
    def _step(self) -> None:
        """Decodes a token of every sequence, greedily."""

    @abstractmethod
    def _rewind(self) -> None:
        """Takes the caches back to where `_fill` left them."""

    @abstractmethod
    def _read(self, tokens: int, threads: int) -> None:
        """Runs a prompt of so many tokens up to its next token, from an empty cache."""

    @abstractmethod
    def release(self) -> None:
        """Frees the caches."""

    def load(self, path: str, **options: Any) -> int | None:
        """Loads a model. Returns the bytes of its weights that a decoded token reads, or None if it does not know."""
        return self._open(path, **options)

    def correlation(self, reference: str) -> float:
        """Of this engine's logits with those in a file, over all positions of its prompt."""
        with np.load(reference) as expected:
            found = self._logits(expected["tokens"].tolist())
            return float(np.corrcoef(found.ravel(), expected["logits"].ravel())[0, 1])

    def prepare(self, batch: int, depth: int, steps: int, threads: int) -> None:
        """Gets ready to `decode` so many steps."""
        self.release()
        self._fill(batch, depth, max(steps, _WARMUP), threads)
        for _ in range(_WARMUP):
            self._step()
        self._rewind()

    def decode(self, steps: int) -> list[float]:
        """Milliseconds of each step after the prepared depth."""
        milliseconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step()
            milliseconds.append(1000 * (time.perf_counter() - start))
        self._rewind()
        return milliseconds

    def prefill(self, tokens: int, threads: int) -> float:
        """Milliseconds from a prompt to its next token."""
        start = time.perf_counter()
        self._read(tokens, threads)
        return 1000 * (time.perf_counter() - start)

    def memory(self) -> int:
        """Peak memory since the last call, in bytes; of the first call, since the process started."""
        peak = peak_memory()
        reset_peak_memory()
        return peak


def random_tokens(count: int, vocabulary: int) -> list[int]:
    """A prompt of random tokens, the same for every engine."""
    return np.random.default_rng(0).integers(vocabulary, size=count).tolist()
