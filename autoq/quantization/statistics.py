"""What calibration remembers of a linear's inputs: their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

# From this width on the Gram matrix is summed in panels, leaving out the blocks that symmetry gives.
_PANEL = 1024


@contextmanager
def _products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While open, fp32 products on a CPU of numbers that are bf16 use its bf16 units, which sum in fp32: the products
    are exact either way. The setting is the process's, so what other threads multiply meanwhile is rounded to bf16."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined, unused-ignore]
    before = settings.fp32_precision
    fits = dtype == torch.bfloat16 and device.type == "cpu"
    if fits:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        if fits:
            settings.fp32_precision = before


class InputStatistics:
    """The inputs `X` of one or several linears, as sums over tokens that can be added up in any order.

    gram: `X X^T`, fp32 `[channels, channels]`; complete once `finish()` was called.
    absolute: sum of `|x|` per channel, fp32 `[channels]`.
    tokens: number of rows seen.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", alone: bool = False) -> None:
        """alone: nothing else is computed in this process meanwhile, so that its settings may be changed."""
        self._alone = alone
        self.gram = torch.zeros(channels, channels, device=device)
        self.absolute = torch.zeros(channels, device=device)
        self.tokens = 0

    @classmethod
    def of(cls, gram: Tensor, absolute: Tensor, tokens: int) -> InputStatistics:
        """Statistics collected earlier."""
        statistics = cls(0, gram.device)
        statistics.gram, statistics.absolute, statistics.tokens = gram, absolute, tokens
        return statistics

    def add(self, inputs: Tensor) -> None:
        """inputs: `[..., channels]`, any floating dtype; summed in fp32."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(device=self.gram.device, dtype=torch.float32)
        self.tokens += rows.shape[0]
        self.absolute += rows.abs().sum(dim=0)
        channels = rows.T.contiguous()
        with _products_of(inputs.dtype, rows.device) if self._alone else nullcontext():
            for start in range(0, len(channels), _PANEL):
                # Only the blocks on and above the diagonal.
                self.gram[start : start + _PANEL, start:].addmm_(channels[start : start + _PANEL], rows[:, start:])

    def finish(self) -> InputStatistics:
        """Fills in what lies below the diagonal, so that the matrix is exactly symmetric."""
        for start in range(0, self.gram.shape[0], _PANEL):
            panel = self.gram[start : start + _PANEL]
            panel[:, :start] = self.gram[:start, start : start + _PANEL].T
            square = panel[:, start : start + _PANEL]
            square.copy_(square.triu() + square.triu(1).T)
        return self

    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite (nor too large to be squared in fp32)."""
        return bool(torch.isfinite(self.gram.diagonal()).all())

    @property
    def mean_absolute(self) -> Tensor:
        """Mean of `|x|` per channel, `[channels]`: the activation magnitude of the AWQ paper."""
        return self.absolute / max(self.tokens, 1)
