"""The packed layout of a quantized weight, which the operators take, and the ways into it and out of it.

It is drawn in csrc/layout.h:

    codes  int32 [row_blocks, units, bits, 16]   blocks of 16 output rows, units of 32 input columns
    scales fp16  [row_blocks, groups, 16]
    zeros  uint8 [row_blocks, groups, 16]

A row's words of a unit hold its codes in order, the first in the lowest bits. Of 3 bits, four codes share a byte of one
word and half a byte of another.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autoq.errors import OperatorError
from autoq.quantization.weight import SUPPORTED_BITS, QuantizedWeight

LANES = 16
UNIT = 32

_LARGE_PAGE = 2**21

# The references of packing convert this many codes at a time.
_REFERENCE_CODES = 2**22


class PackedWeight(NamedTuple):
    """A quantized weight `[out, in]` in the packed layout; padding is zero.

    codes: int32 `[ceil(out / 16), ceil(in / 32), bits, 16]`.
    scales: fp16 `[ceil(out / 16), groups, 16]`.
    zeros: uint8 `[ceil(out / 16), groups, 16]`, explicit also for symmetric quantization.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, groups: int, bits: int, device: torch.device | str = "cpu"
    ) -> PackedWeight:
        """Memory for a weight of this shape."""
        row_blocks, units = -(-out_features // LANES), -(-in_features // UNIT)
        return cls(
            _empty((row_blocks, units, bits, LANES), torch.int32, device),
            _empty((row_blocks, groups, LANES), torch.float16, device),
            _empty((row_blocks, groups, LANES), torch.uint8, device),
        )

    @classmethod
    def joined(cls, weights: Sequence[PackedWeight]) -> PackedWeight:
        """The outputs of all the weights, one after the other; each but the last has a multiple of 16. Nothing is
        copied where they lie in memory like that."""
        return cls(*(_joined(parts) for parts in zip(*weights, strict=True)))

    def split(self, outputs: Sequence[int]) -> list[PackedWeight]:
        """Views of so many outputs each, one after the other; each but the last has a multiple of 16."""
        blocks = [-(-count // LANES) for count in outputs]
        return [PackedWeight(*parts) for parts in zip(*(tensor.split(blocks) for tensor in self), strict=True)]

    def put_parameters(self, scales: Tensor, zeros: Tensor) -> None:
        """Fills scales and zeros from `[out, groups]`, of any strides."""
        self.scales.copy_(pack_parameters(scales))
        self.zeros.copy_(pack_parameters(zeros))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`, but much of the CPU's memory is in large pages where the system has them: reading it then takes
    fewer looks at page tables."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if torch.device(device).type == "cpu" and size >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages, rest = divmod(size, _LARGE_PAGE)
        pages += rest > max(0, _LARGE_PAGE - size // 8)  # one that is not full, where that wastes little
        with contextlib.suppress(OSError):  # a system that was built without, or has no room
            memory = mmap.mmap(-1, size + 2 * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
            memory.madvise(mmap.MADV_HUGEPAGE, start, pages * _LARGE_PAGE)
            return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors behind each other: as a view, where they lie so in memory, as those of a model that was loaded do; else
    as a copy."""
    first = parts[0]
    rows = [part.shape[0] for part in parts]
    shape = (sum(rows), *first.shape[1:])
    starts = accumulate((part.numel() for part in parts), initial=first.storage_offset())
    if all(
        part.untyped_storage()._cdata == first.untyped_storage()._cdata
        and part.storage_offset() == start
        and part.is_contiguous()
        for part, start in zip(parts, starts, strict=False)
    ):
        return first.as_strided(shape, first.stride())
    whole = _empty(shape, first.dtype, first.device)
    for target, part in zip(whole.split(rows), parts, strict=True):
        target.copy_(part)
    return whole


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_groups(groups: int, in_features: int) -> None:
    if groups == 1:
        return
    if groups < 1 or in_features % groups or (in_features // groups) % LANES:
        raise OperatorError(
            f"{groups} groups do not cut {in_features} input features into groups of a multiple of {LANES}; "
            f"use a group size that is a multiple of {LANES} and divides the input features, or one group"
        )


def _check_parameters(name: str, tensor: Tensor, dtype: torch.dtype, row_blocks: int) -> None:
    if tensor.dtype != dtype:
        raise OperatorError(f"{name} are {tensor.dtype} but must be {dtype}; make them with autoq.packed.pack")
    if tensor.ndim != 3 or tensor.shape[0] != row_blocks or tensor.shape[2] != LANES:
        raise OperatorError(
            f"{name} have the shape {list(tensor.shape)} but must have [{row_blocks}, groups, {LANES}] for this many "
            "output features; make them with autoq.packed.pack"
        )


def check_packed(packed: PackedWeight, bits: int, out_features: int, in_features: int) -> None:
    """Raises OperatorError unless the tensors are a packed weight of this shape."""
    if bits not in SUPPORTED_BITS:
        raise OperatorError(f"bits is {bits} but must be one of {SUPPORTED_BITS}")
    if out_features < 1 or in_features < 1:
        raise OperatorError(f"a weight of shape [{out_features}, {in_features}] is empty; both must be positive")
    codes, scales, zeros = packed
    row_blocks, units = -(-out_features // LANES), -(-in_features // UNIT)
    if codes.dtype != torch.int32:
        raise OperatorError(f"codes are {codes.dtype} but must be torch.int32; make them with autoq.packed.pack")
    if tuple(codes.shape) != (row_blocks, units, bits, LANES):
        raise OperatorError(
            f"codes have the shape {list(codes.shape)} but {out_features} output features, {in_features} input "
            f"features and {bits} bits want [{row_blocks}, {units}, {bits}, {LANES}]; pack the weight for them"
        )
    _check_parameters("scales", scales, torch.float16, row_blocks)
    _check_parameters("zeros", zeros, torch.uint8, row_blocks)
    if zeros.shape[1] != scales.shape[1]:
        raise OperatorError(
            f"zeros have {zeros.shape[1]} groups but scales have {scales.shape[1]}; both must have the same number"
        )
    _check_groups(scales.shape[1], in_features)
    if not codes.device == scales.device == zeros.device:
        raise OperatorError(
            f"codes are on {codes.device}, scales on {scales.device} and zeros on {zeros.device}; "
            "move them to the same device"
        )


# ---- the layout ------------------------------------------------------------------------------------------------------


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    out_features, in_features = codes.shape
    codes = functional.pad(codes, (0, -in_features % UNIT, 0, -out_features % LANES)).contiguous()
    packed = _pack_three_bits(codes) if bits == 3 else _join_fields(codes, bits)
    words = packed.view(torch.int32).view(codes.shape[0] // LANES, LANES, codes.shape[1] // UNIT, bits)
    return words.permute(0, 2, 3, 1).contiguous()


def _unpack_codes(words: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    row_blocks, _, _, lanes = words.shape
    # A clone, because `contiguous` leaves strides of dimensions of size 1 as they are, and `view` objects to them.
    words = words.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    packed = words.view(torch.uint8).view(row_blocks * lanes, -1)
    codes = _unpack_three_bits(packed) if bits == 3 else _split_fields(packed, bits)
    return codes[:out_features, :in_features].contiguous()


def _join_fields(fields: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, uint8 `[rows, columns]`, as bytes, `[rows, columns * width / 8]`."""
    parts = fields.view(fields.shape[0], -1, 8 // width)
    packed = parts[:, :, 0].clone()
    for i in range(1, 8 // width):
        packed |= parts[:, :, i] << (width * i)
    return packed


def _split_fields(packed: Tensor, width: int) -> Tensor:
    """The inverse of `_join_fields`."""
    if width == 8:
        return packed
    fields = packed.new_empty(*packed.shape, 8 // width)
    for i in range(8 // width):
        torch.bitwise_and(packed >> (width * i), 2**width - 1, out=fields[:, :, i])
    return fields.view(packed.shape[0], -1)


def _pack_three_bits(codes: Tensor) -> Tensor:
    """Codes, uint8 `[rows, units * 32]`, as bytes `[rows, units * 12]`, drawn in csrc/layout.h."""
    parts = codes.view(codes.shape[0], -1, 2, 4, 4)  # rows, units, halves, bytes, codes
    first, second, third, fourth = parts.unbind(-1)
    own = first | second << 3 | (fourth & 3) << 6
    shared = third | (fourth & 4) << 1
    both = shared[:, :, 0] | shared[:, :, 1] << 4
    return torch.cat((own.flatten(2), both), dim=2).flatten(1)


def _unpack_three_bits(packed: Tensor) -> Tensor:
    """The inverse of `_pack_three_bits`."""
    words = packed.view(packed.shape[0], -1, 3, 4)
    own, both = words[:, :, :2], words[:, :, 2:]
    shared = torch.cat((both & 15, both >> 4), dim=2)
    codes = (own & 7, own >> 3 & 7, shared & 7, own >> 6 | (shared & 8) >> 1)
    return torch.stack(codes, dim=-1).flatten(1)


def pack_parameters(parameters: Tensor) -> Tensor:
    """`[out, groups]`, of any strides, as `[row_blocks, groups, 16]`."""
    padded = functional.pad(parameters, (0, 0, 0, -parameters.shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _unpack_parameters(packed: Tensor, out_features: int) -> Tensor:
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features].contiguous()


def pack(weight: QuantizedWeight) -> PackedWeight:
    """A quantized weight in the layout of the operators, on the device of its codes.

    Scales that are not fp16 are rounded to it; otherwise `unpack` gives back the same weight, bit for bit.

    Raises OperatorError when the bits, dtypes, shapes or group size are not those of a weight that the operators take,
    when a code does not fit its bits, or when a scale is too large for fp16.
    """
    codes, scales, bits = weight.codes, weight.scales, weight.bits
    if bits not in SUPPORTED_BITS:
        raise OperatorError(f"bits is {bits} but must be one of {SUPPORTED_BITS}")
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.numel() == 0:
        raise OperatorError(f"codes are {codes.dtype} {list(codes.shape)} but must be torch.uint8 [out, in], not empty")
    zeros = weight.explicit_zeros()
    if scales.ndim != 2 or scales.shape[0] != codes.shape[0] or zeros.shape != scales.shape:
        raise OperatorError(
            f"scales have the shape {list(scales.shape)} and zeros {list(zeros.shape)} but both must have "
            f"[{codes.shape[0]}, groups], one row per output feature"
        )
    if zeros.dtype != torch.uint8:
        raise OperatorError(f"zeros are {zeros.dtype} but must be torch.uint8")
    _check_groups(scales.shape[1], codes.shape[1])
    half_scales = scales.half()
    if int(codes.max()) >= 2**bits:
        raise OperatorError(f"a code is {int(codes.max())} but {bits} bits hold at most {2**bits - 1}")
    if bool((half_scales.isinf() & scales.isfinite()).any()):
        raise OperatorError("a scale is too large for torch.float16, the dtype in which the operators keep scales")
    packed = PackedWeight.empty(codes.shape[0], codes.shape[1], scales.shape[1], bits, codes.device)
    torch.ops.autoq.pack_codes(codes, bits, packed.codes)
    packed.put_parameters(half_scales, zeros)
    return packed


def unpack(packed: PackedWeight, bits: int, out_features: int, in_features: int, symmetric: bool) -> QuantizedWeight:
    """The inverse of `pack`.

    symmetric: whether the weight was quantized symmetrically, so that its zeros are left implicit (None).

    Raises OperatorError when the tensors are not a packed weight of this shape.
    """
    check_packed(packed, bits, out_features, in_features)
    return QuantizedWeight(
        codes=_unpack_codes(packed.codes, bits, out_features, in_features),
        scales=_unpack_parameters(packed.scales, out_features),
        zeros=None if symmetric else _unpack_parameters(packed.zeros, out_features),
        bits=bits,
    )


# ---- the operators that pack -----------------------------------------------------------------------------------------

_library = torch.library.Library("autoq", "FRAGMENT")


def define_packing(schema: str, reference: Callable[..., None]) -> None:
    """Defines an operator that puts codes, stored in some way, into those of a packed weight, its last argument."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autoq::{name}", lambda *_: None, lib=_library)


def reference_pack_codes(codes: Tensor, bits: int, packed: Tensor) -> None:
    """Puts codes, uint8 `[out, in]`, into those of a packed weight."""
    pack_some_at_a_time(lambda outputs: codes[outputs], codes.shape[0], codes.shape[1], bits, packed)


def pack_some_at_a_time(
    codes: Callable[[slice], Tensor], out_features: int, in_features: int, bits: int, packed: Tensor
) -> None:
    """Puts codes into those of a packed weight, and needs little memory beside.

    codes: gives those of some outputs, uint8 `[some, in]`.
    """
    blocks = max(1, _REFERENCE_CODES // (LANES * in_features))
    for first in range(0, packed.shape[0], blocks):
        last = min(first + blocks, packed.shape[0])
        packed[first:last] = _pack_codes(codes(slice(first * LANES, min(last * LANES, out_features))), bits)


define_packing("pack_codes(Tensor codes, int bits, Tensor(a!) packed) -> ()", reference_pack_codes)
