"""The linear layer of a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoq import ops
from autoq.formats.base import LinearSpec
from autoq.ops import PackedWeight
from autoq.quantization.weight import QuantizedWeight


class QuantLinear(nn.Module):
    """`y = x W^T + b` with a quantized, packed weight; the codes are its only copy of the weight.

    Input `[..., in_features]` in fp32, bf16 or fp16; output `[..., out_features]` in the same dtype; sums in fp32.
    The gradient reaches the input (so adapters around it can train), not the weight.

    `mode` is that of `autoq.ops.linear`, "exact" or "int8"; it may be set at any time.

    Buffers: `codes`, `scales`, `zeros` in the packed layout of `autoq.ops`, and `bias` or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, spec: LinearSpec, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.mode = "exact"
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantLinear:
        """Packs a quantized weight."""
        out_features, in_features = weight.codes.shape
        spec = LinearSpec(out_features, in_features, weight.bits, weight.group_size, weight.zeros is not None)
        return cls(spec, ops.pack(weight), bias)

    @classmethod
    def empty(cls, spec: LinearSpec, bias: Tensor | None = None) -> QuantLinear:
        """A linear whose weight is on the meta device, to be filled in."""

        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(spec.out_features, columns, dtype=dtype, device="meta")

        zeros = empty(spec.groups, torch.uint8) if spec.zero_point else None
        codes, scales = empty(spec.in_features, torch.uint8), empty(spec.groups, torch.float16)
        return cls.from_weight(QuantizedWeight(codes, scales, zeros, spec.bits), bias)

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]`, made anew at each access; fp16 as its scales, or the bias's dtype."""
        dtype = self.scales.dtype if self.bias is None else self.bias.dtype
        return ops.dequantize(self.packed(), self.spec.bits, self.out_features, self.in_features, dtype)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it was packed."""
        spec = self.spec
        return ops.unpack(self.packed(), spec.bits, spec.out_features, spec.in_features, not spec.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return ops.linear(x, self.packed(), bias, self.spec.bits, self.spec.out_features, self.mode)

    def packed(self) -> PackedWeight:
        """The tensors that the operators take."""
        return PackedWeight(self.codes, self.scales, self.zeros)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.to(dtype) is about the activations: scales rounded to bf16 would be other weights.
        dtype = self.scales.dtype
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != dtype:
            self.scales = before.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, bias={self.bias is not None}, "
            f"bits={spec.bits}, group_size={spec.group_size}, zero_point={spec.zero_point}"
        )


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name` within `root`, training or not as that was."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module.train(root.get_submodule(name).training))
