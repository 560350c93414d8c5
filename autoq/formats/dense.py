"""autoq's own layout (`version: dense`): any width, no padding but to the byte at the end of a row.

qweight  uint8 [out, ceil(in * bits / 8)]      each row a bit stream, least significant bit first:
                                               code k is bits k * bits .. (k + 1) * bits - 1
qzeros   uint8 [out, ceil(groups * bits / 8)]  likewise; absent for symmetric weights
scales   fp16  [out, groups]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from autoq.formats.base import LinearSpec, TensorSpec
from autoq.packed import PackedWeight, define_packing, pack_some_at_a_time
from autoq.quantization.weight import QuantizedWeight, symmetric_zeros

# Eight codes fill a whole number of bytes, whatever their width.
_CODES = 8


def _row_bytes(codes: int, bits: int) -> int:
    return (codes * bits + 7) // 8


def _to_bit_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, codes]` -> uint8 `[rows, bytes]`."""
    rows, count = codes.shape
    padded = pad(codes, (0, -count % _CODES)).reshape(rows, -1, _CODES).to(torch.int64)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for index in range(_CODES):
        words |= padded[:, :, index] << (bits * index)
    stream = torch.stack([(words >> (8 * byte)) & 255 for byte in range(bits)], dim=2).to(torch.uint8)
    return stream.reshape(rows, -1)[:, : _row_bytes(count, bits)].contiguous()


def _from_bit_stream(stream: Tensor, count: int, bits: int) -> Tensor:
    """uint8 `[rows, bytes]` -> uint8 `[rows, count]`."""
    rows = stream.shape[0]
    padded = pad(stream, (0, -stream.shape[1] % bits)).reshape(rows, -1, bits).to(torch.int64)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=stream.device)
    for byte in range(bits):
        words |= padded[:, :, byte] << (8 * byte)
    codes = torch.stack([(words >> (bits * index)) & (2**bits - 1) for index in range(_CODES)], dim=2)
    return codes.to(torch.uint8).reshape(rows, -1)[:, :count].contiguous()


def _repack_stream(stream: Tensor, in_features: int, bits: int, packed: Tensor) -> None:
    def codes(outputs: slice) -> Tensor:
        return _from_bit_stream(stream[outputs], in_features, bits)

    pack_some_at_a_time(codes, stream.shape[0], in_features, bits, packed)


define_packing("repack_bit_stream(Tensor stream, int in_features, int bits, Tensor(a!) packed) -> ()", _repack_stream)


@dataclass(frozen=True)
class Dense:
    name: str = "dense"

    def obstacle(self, spec: LinearSpec) -> str | None:
        return None

    def tensors(self, spec: LinearSpec) -> dict[str, TensorSpec]:
        tensors = {
            "qweight": TensorSpec(torch.uint8, (spec.out_features, _row_bytes(spec.in_features, spec.bits))),
            "scales": TensorSpec(torch.float16, (spec.out_features, spec.groups)),
        }
        if spec.zero_point:
            tensors["qzeros"] = TensorSpec(torch.uint8, (spec.out_features, _row_bytes(spec.groups, spec.bits)))
        return tensors

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {
            "qweight": _to_bit_stream(weight.codes, weight.bits),
            "scales": weight.scales.to(torch.float16).contiguous(),
        }
        if weight.zeros is not None:
            tensors["qzeros"] = _to_bit_stream(weight.zeros, weight.bits)
        return tensors

    def repack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, into: PackedWeight) -> None:
        torch.ops.autoq.repack_bit_stream(tensors["qweight"], spec.in_features, spec.bits, into.codes)
        if spec.zero_point:
            zeros = _from_bit_stream(tensors["qzeros"], spec.groups, spec.bits)
        else:
            zeros = symmetric_zeros(tensors["scales"], spec.bits)
        into.put_parameters(tensors["scales"], zeros)


FORMAT = Dense()
