"""An activation whose output is divided by a scale per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """`act(x) / scales`: absorbs the scale of the linear behind a nonlinearity that no weight precedes.

    act: the activation module it replaces.
    scales: buffer `[channels]`; the checkpoint key is `<activation>.scales`, as in the original AWQ code.
    """

    scales: Tensor

    def __init__(self, act: nn.Module, channels: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("scales", torch.ones(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales.to(x.dtype)
