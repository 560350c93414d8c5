"""The modules quantized models are made of."""

from __future__ import annotations

from autoq.nn.activation import ScaledActivation
from autoq.nn.linear import QuantEmbedding, QuantLinear, QuantModule, shares_head

__all__ = ["QuantEmbedding", "QuantLinear", "QuantModule", "ScaledActivation", "shares_head"]
