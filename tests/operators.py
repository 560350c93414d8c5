"""What the tests of the operators share: weights, inputs, the exact result, and the native extension."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from autoq import ops
from autoq.architectures.base import NormKind
from autoq.extension import extension_missing
from autoq.packed import pack
from autoq.quantization.weight import QuantizedWeight, dequantize

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding the result to the dtype; the multiplication itself is held to the first.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4}
# Output features, input features, group size: odd ones, and groups of several kinds.
SHAPES = [
    (1, 1, -1),
    (5, 7, -1),
    (16, 33, -1),
    (17, 100, -1),
    (31, 64, 16),
    (48, 96, 48),
    (33, 256, 128),
    (20, 512, 256),
]


def load_extension() -> ModuleType | None:
    return importlib.import_module("autoq._C") if extension_missing() is None else None


EXTENSION = load_extension()
CAPABILITIES = EXTENSION.cpu_capabilities() if EXTENSION else ["reference"]
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the native extension is not installed")


def make_weight(out_features: int, in_features: int, bits: int, group_size: int, seed: int = 0) -> QuantizedWeight:
    """A weight with every code and zero point equally likely, so that no bit of the layout goes unused."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else in_features // group_size
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out_features, groups, generator=generator) * 0.02 + 0.001).half()
    return QuantizedWeight(codes, scales, zeros, bits)


def make_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def exact_linear(input: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    result = input.double() @ dequantize(weight, torch.float64).T
    return result if bias is None else result + bias.double()


def run_linear(input: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, mode: str = "exact") -> Tensor:
    return ops.linear(input, pack(weight), bias, weight.bits, weight.codes.shape[0], mode)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of a result without infinities."""
    assert found.isfinite().all()
    return float((found.double() - exact).norm() / exact.norm())


def exact_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, epsilon: float) -> Tensor:
    """In float64."""
    x = x.double()
    if kind == NormKind.LAYER:
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()
