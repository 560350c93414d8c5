"""AutoAWQ's GEMM layout (`version: gemm`): 4 bits, read by AutoAWQ, vLLM, SGLang and transformers.

qweight  int32 [in, out / 8]      a word holds one input's codes for eight outputs
qzeros   int32 [groups, out / 8]  likewise, zero points as they are
scales   fp16  [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.formats.base import LinearSpec, TensorSpec
from autoq.packed import PackedWeight, define_packing, pack_some_at_a_time
from autoq.quantization.weight import QuantizedWeight

_PER_WORD = 8
# Bit offset of each of the eight columns of a word: nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i].
_SHIFTS = tuple(4 * nibble for nibble in (0, 4, 1, 5, 2, 6, 3, 7))


def _pack_columns(values: Tensor) -> Tensor:
    """uint8 `[rows, columns]` below 16 -> int32 `[rows, columns / 8]`."""
    columns = values.reshape(values.shape[0], -1, _PER_WORD).to(torch.int32)
    words = torch.zeros(columns.shape[:2], dtype=torch.int32, device=values.device)
    for column, shift in enumerate(_SHIFTS):
        words |= columns[:, :, column] << shift
    return words


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 `[rows, words]` -> uint8 `[rows, 8 * words]`."""
    values = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8, device=words.device)
    for column, shift in enumerate(_SHIFTS):
        values[:, :, column] = (words >> shift) & 15
    return values.reshape(words.shape[0], -1)


def _repack_words(words: Tensor, packed: Tensor) -> None:
    def codes(outputs: slice) -> Tensor:
        return _unpack_columns(words[:, outputs.start // _PER_WORD : outputs.stop // _PER_WORD]).T

    pack_some_at_a_time(codes, _PER_WORD * words.shape[1], words.shape[0], 4, packed)


define_packing("repack_gemm_codes(Tensor words, Tensor(a!) packed) -> ()", _repack_words)


@dataclass(frozen=True)
class Gemm:
    name: str = "gemm"

    def obstacle(self, spec: LinearSpec) -> str | None:
        if spec.bits != 4:
            return f"the gemm format holds 4-bit codes only, not {spec.bits}-bit ones"
        if spec.out_features % _PER_WORD:
            return f"the gemm format needs output features divisible by {_PER_WORD}, not {spec.out_features}"
        return None

    def tensors(self, spec: LinearSpec) -> dict[str, TensorSpec]:
        words = spec.out_features // _PER_WORD
        return {
            "qweight": TensorSpec(torch.int32, (spec.in_features, words)),
            "qzeros": TensorSpec(torch.int32, (spec.groups, words)),
            "scales": TensorSpec(torch.float16, (spec.groups, spec.out_features)),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            "qweight": _pack_columns(weight.codes.T),
            "qzeros": _pack_columns(weight.explicit_zeros().T),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
        }

    def repack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, into: PackedWeight) -> None:
        torch.ops.autoq.repack_gemm_codes(tensors["qweight"], into.codes)
        into.put_parameters(tensors["scales"].T, _unpack_columns(tensors["qzeros"]).T)


FORMAT = Gemm()
