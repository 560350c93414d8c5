"""What the driver asks of an engine that multiplies by one quantized weight."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

# With more rows of activations a matmul takes so long that it does not matter where the weight comes from.
COLD_ROWS = 16
_LEAST_SECONDS = 0.05


class Kernel(ABC):
    """One way to multiply, with enough copies of the weight that they do not fit the caches.

    A constructor sets `bytes`, of one copy, `copies`, and `symmetric`: which of the two weights it takes.
    """

    symmetric = False
    bytes: int
    copies: int

    @abstractmethod
    def prepare(self, x: np.ndarray, threads: int) -> None:
        """Takes activations, fp32 `[rows, in]` with values that bf16 holds."""

    @abstractmethod
    def run(self, copies: int) -> Any:
        """Multiplies by the first so many copies, once each; returns the last result."""

    @abstractmethod
    def output(self, copies: int) -> np.ndarray:
        """`run`'s last result `[rows, out]`."""


class MatmulWorker(ABC):
    """An engine with the kernels it has for one weight; they stay in memory so that rounds can interleave."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The packages that matter to the figures."""

    @abstractmethod
    def _kernels(self, folder: Path, cache_bytes: int) -> dict[str, Kernel]:
        """The kernels by name, with the weight in a folder (see `prepare.Prepare.weight`)."""

    def load(self, folder: str, cache_bytes: int) -> dict[str, int]:
        """Loads the weight in place of the one before. Returns the bytes of a copy by kernel."""
        self._folder = Path(folder)
        self._loaded: dict[str, Kernel] = {}
        self._loaded = self._kernels(self._folder, cache_bytes)
        return {name: kernel.bytes for name, kernel in self._loaded.items()}

    def measure(self, kernel: str, rows: int, threads: int) -> float:
        """Microseconds of one matmul with so many rows of activations."""
        found = self._loaded[kernel]
        copies = found.copies if rows <= COLD_ROWS else 1
        found.prepare(self._activations("gaussian", rows), threads)
        found.run(1)
        start, passes = time.perf_counter(), 0
        while passes == 0 or time.perf_counter() - start < _LEAST_SECONDS:
            found.run(copies)
            passes += 1
        return 1e6 * (time.perf_counter() - start) / passes / copies

    def error(self, kernel: str, rows: int, activations: str, threads: int) -> float:
        """Error against the float64 product with the same weight, relative in the Frobenius norm."""
        found = self._loaded[kernel]
        found.prepare(self._activations(activations, rows), threads)
        weight = "symmetric" if found.symmetric else "asymmetric"
        expected = np.load(self._folder / f"{weight}_{activations}.npy")[:rows]
        difference = found.output(1)[: len(expected)].astype(np.float64) - expected
        return float(np.linalg.norm(difference) / np.linalg.norm(expected))

    def _activations(self, name: str, rows: int) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")[:rows].copy()


def copies_beyond(cache_bytes: int, size: int) -> int:
    """How many copies of a weight the caches do not hold."""
    return max(1, math.ceil(cache_bytes / size))


def load_weight(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes uint8 `[out, in]`, scales fp16 and zeros uint8 `[out, groups]` of the weight of a kind."""
    codes, scales, zeros = (np.load(folder / f"{kind}_{part}.npy") for part in ("codes", "scales", "zeros"))
    return codes, scales, zeros
