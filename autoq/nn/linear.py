"""The modules of a quantized model that hold its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq import ops
from autoq.formats.base import LinearSpec
from autoq.packed import PackedWeight, pack, unpack
from autoq.quantization.weight import QuantizedWeight


class QuantModule(nn.Module):
    """A module with a quantized weight `[out, in]`, packed; the codes are its only copy of the weight.

    Buffers: `codes`, `scales`, `zeros` in the packed layout of `autoq.packed`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, spec: LinearSpec, packed: PackedWeight) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it was packed."""
        spec = self.spec
        return unpack(self.packed(), spec.bits, spec.out_features, spec.in_features, not spec.zero_point)

    def packed(self) -> PackedWeight:
        """The tensors that the operators take."""
        return PackedWeight(self.codes, self.scales, self.zeros)

    def take_weight_of(self, other: QuantModule) -> None:
        """Has the tensors of another module with an equal weight in the place of its own."""
        self.codes, self.scales, self.zeros = other.packed()

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(self.packed(), self.spec.bits, self.spec.out_features, self.spec.in_features, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.to(dtype) is about the activations: scales rounded to bf16 would be other weights.
        dtype = self.scales.dtype
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != dtype:
            self.scales = before.to(self.scales.device)
        return self


class QuantLinear(QuantModule):
    """`y = x W^T + b` with a quantized weight.

    Input `[..., in_features]` in fp32, bf16 or fp16; output `[..., out_features]` in the same dtype, or in autocast's
    where that is on, as of torch's linears; sums in fp32. The gradient reaches the input (so adapters around it can
    train), not the weight.

    `mode` is that of `autoq.ops.linear`, "exact" or "int8"; it may be set at any time.

    Buffers: those of QuantModule, and `bias` or None.
    """

    bias: Tensor | None

    def __init__(self, spec: LinearSpec, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(spec, packed)
        self.mode = "exact"
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantLinear:
        """Packs a quantized weight."""
        return cls(_spec_of(weight), pack(weight), bias)

    @classmethod
    def empty(cls, spec: LinearSpec, bias: Tensor | None = None) -> QuantLinear:
        """A linear whose weight is on the meta device, to be filled in."""
        return cls(spec, _empty(spec), bias)

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]`, made anew at each access; fp16 as its scales, or the bias's dtype."""
        return self._dequantized(self.scales.dtype if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return ops.linear(x, self.packed(), bias, self.spec.bits, self.spec.out_features, self.mode)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, {_settings_of(self.spec)}"


class DenseLinear(nn.Linear):
    """A linear that is not quantized, multiplied by `autoq.ops.dense_linear`; a plain one can become one in place."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense_linear(x, self.weight, self.bias)


class QuantEmbedding(QuantModule):
    """The rows of a quantized weight `[num_embeddings, embedding_dim]` that token ids ask for.

    Input: integers of any shape; output `[..., embedding_dim]` in `dtype`, which `.to()` and the like change.
    """

    def __init__(self, spec: LinearSpec, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(spec, packed)
        self.dtype = dtype

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, dtype: torch.dtype) -> QuantEmbedding:
        """Packs a quantized weight, a row for each token."""
        return cls(_spec_of(weight), pack(weight), dtype)

    @classmethod
    def empty(cls, spec: LinearSpec, dtype: torch.dtype) -> QuantEmbedding:
        """Embeddings whose weight is on the meta device, to be filled in."""
        return cls(spec, _empty(spec), dtype)

    @property
    def num_embeddings(self) -> int:
        return self.spec.out_features

    @property
    def embedding_dim(self) -> int:
        return self.spec.in_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at each access."""
        return self._dequantized(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.packed(), self.spec.bits, self.num_embeddings, self.embedding_dim, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_settings_of(self.spec)}"


def shares_head(model: PreTrainedModel) -> bool:
    """Whether the output head of a model has the very codes of its embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return isinstance(embeddings, QuantEmbedding) and isinstance(head, QuantLinear) and head.codes is embeddings.codes


def _spec_of(weight: QuantizedWeight) -> LinearSpec:
    out_features, in_features = weight.codes.shape
    return LinearSpec(out_features, in_features, weight.bits, weight.group_size, weight.zeros is not None)


def _empty(spec: LinearSpec) -> PackedWeight:
    """On the meta device."""
    return PackedWeight.empty(spec.out_features, spec.in_features, spec.groups, spec.bits, "meta")


def _settings_of(spec: LinearSpec) -> str:
    return f"bits={spec.bits}, group_size={spec.group_size}, zero_point={spec.zero_point}"


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one called `name` within `root`, training or not as that was."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module.train(root.get_submodule(name).training))


@contextmanager
def replaced(root: nn.Module, name: str, module: nn.Module | None) -> Iterator[None]:
    """While open, another module is in the place of the one called `name`; None: the one that is there."""
    own = root.get_submodule(name)
    replace_module(root, name, own if module is None else module)
    try:
        yield
    finally:
        replace_module(root, name, own)
