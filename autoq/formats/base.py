"""What an on-disk format is: named tensors made of a quantized weight, and a packed weight made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autoq.packed import PackedWeight
from autoq.quantization.weight import QuantizedWeight


class LinearSpec(NamedTuple):
    """The shape of a quantized linear, or of embeddings, with a row for each token. `group_size` is resolved:
    in_features where the config says -1."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    zero_point: bool

    @classmethod
    def of(cls, weight: Tensor, bits: int, group_size: int, zero_point: bool) -> LinearSpec:
        """What a weight `[out, in]` becomes with a config's settings, a group size of -1 among them."""
        out_features, in_features = weight.shape
        return cls(out_features, in_features, bits, in_features if group_size == -1 else group_size, zero_point)

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Format(Protocol):
    """One on-disk layout of a quantized weight, without its bias. A module of this package that has a FORMAT adds one.

    What `repack` makes of `pack(weight)` is `autoq.packed.pack(weight)`, bit for bit.
    """

    @property
    def name(self) -> str:
        """The `version` it goes by in a checkpoint's config."""

    def obstacle(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold such a linear, or None."""

    def tensors(self, spec: LinearSpec) -> dict[str, TensorSpec]:
        """The tensors of such a linear, by the last part of their name."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of a weight, by the last part of their name."""

    def repack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, into: PackedWeight) -> None:
        """Puts the weight that tensors matching `tensors(spec)` hold into the layout of the operators: its codes by an
        operator of its own (`autoq.packed.define_packing`), as dense.py and gemm.py do, or `autoq::pack_codes`."""
