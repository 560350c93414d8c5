"""The operators of the package: the packed layout, their schemas, their reference in plain torch and their autograd.

Every operator runs on every device through its reference; the native extension `autoq._C` (csrc/) replaces it by fast
kernels where it is installed. The packed layout is drawn in csrc/layout.h:

    codes  int32 [row_blocks, units, bits, 16]   blocks of 16 output rows, units of 32 input columns
    scales fp16  [row_blocks, groups, 16]
    zeros  uint8 [row_blocks, groups, 16]

A row's words of a unit hold its codes in order, the first in the lowest bits. Of 3 bits, four codes share a byte of one
word and half a byte of another.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autoq.errors import OperatorError
from autoq.quantization import weight as quantized
from autoq.quantization.weight import SUPPORTED_BITS, QuantizedWeight

LANES = 16
UNIT = 32
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("exact", "int8")

# Up to so many rows our kernel multiplies dense weights faster than torch.
_FEW_DENSE_ROWS = 4

_LARGE_PAGE = 2**21

# The references dequantize this many weights at a time, so that they need no dense copy of a large layer, and convert
# this many codes.
_REFERENCE_PANEL = 2**25
_REFERENCE_CODES = 2**22


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
        self.scales.copy_(_pack_parameters(scales))
        self.zeros.copy_(_pack_parameters(zeros))


# ---- the extension ---------------------------------------------------------------------------------------------------


def _load_extension() -> str | None:
    """Imports the native extension, which registers its kernels. Returns why it could not be, or None."""
    try:
        importlib.import_module("autoq._C")
    except ModuleNotFoundError:
        return "is not installed"
    except ImportError as error:
        return f"cannot be loaded ({error})"
    return None


_INSTALL = "To build it, run `pip install --no-build-isolation .` where torch and a C++ compiler are installed."
_extension_warning: str | None = None


def extension_missing() -> str | None:
    """Why the native extension is not in use, or None when it is."""
    return _extension_problem


def _warn_once(device: torch.device) -> None:
    """Says once that the slow path is taken, when an operator first takes it for want of the extension."""
    global _extension_warning
    if _extension_warning is not None:
        return
    if _extension_problem is not None:
        _extension_warning = f"autoq's native extension {_extension_problem}, so its operators run slowly. {_INSTALL}"
    elif device.type == "cuda":
        _extension_warning = f"autoq's native extension was built without CUDA kernels, so it runs slowly. {_INSTALL}"
    else:
        return
    warnings.warn(_extension_warning, RuntimeWarning, stacklevel=3)


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
        raise OperatorError(f"{name} are {tensor.dtype} but must be {dtype}; make them with autoq.ops.pack")
    if tensor.ndim != 3 or tensor.shape[0] != row_blocks or tensor.shape[2] != LANES:
        raise OperatorError(
            f"{name} have the shape {list(tensor.shape)} but must have [{row_blocks}, groups, {LANES}] for this many "
            "output features; make them with autoq.ops.pack"
        )


def _check_packed(packed: PackedWeight, bits: int, out_features: int, in_features: int) -> None:
    """Raises OperatorError unless the tensors are a packed weight of this shape."""
    if bits not in SUPPORTED_BITS:
        raise OperatorError(f"bits is {bits} but must be one of {SUPPORTED_BITS}")
    if out_features < 1 or in_features < 1:
        raise OperatorError(f"a weight of shape [{out_features}, {in_features}] is empty; both must be positive")
    codes, scales, zeros = packed
    row_blocks, units = -(-out_features // LANES), -(-in_features // UNIT)
    if codes.dtype != torch.int32:
        raise OperatorError(f"codes are {codes.dtype} but must be torch.int32; make them with autoq.ops.pack")
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


def _check_linear(
    input: Tensor, packed: PackedWeight, bias: Tensor | None, bits: int, out_features: int, mode: str
) -> None:
    if mode not in MODES:
        raise OperatorError(f"mode is {mode!r} but must be one of {MODES}")
    if input.ndim < 1:
        raise OperatorError("input has no dimension but its last one must be the input features; reshape it")
    if input.dtype not in SUPPORTED_DTYPES:
        raise OperatorError(f"input is {input.dtype} but must be one of {SUPPORTED_DTYPES}; convert it")
    units = packed.codes.shape[1] if packed.codes.ndim == 4 else 0
    if units and -(-input.shape[-1] // UNIT) != units:
        raise OperatorError(
            f"input has the shape {list(input.shape)} but the weight, packed in {units} units of {UNIT} columns, takes "
            f"{(units - 1) * UNIT + 1} to {units * UNIT} input features, in the last dimension"
        )
    _check_packed(packed, bits, out_features, input.shape[-1])
    if input.device != packed.codes.device:
        raise OperatorError(f"input is on {input.device} but the weight on {packed.codes.device}; move one of them")
    if bias is None:
        return
    if tuple(bias.shape) != (out_features,):
        raise OperatorError(
            f"bias has the shape {list(bias.shape)} but must have [{out_features}], one value per output feature"
        )
    if bias.dtype != input.dtype:
        raise OperatorError(f"bias is {bias.dtype} but must have the input's dtype, {input.dtype}; convert it")
    if bias.device != input.device:
        raise OperatorError(f"bias is on {bias.device} but the input on {input.device}; move one of them")


def _check_dequantize(packed: PackedWeight, bits: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    if dtype not in SUPPORTED_DTYPES:
        raise OperatorError(f"the dtype is {dtype} but must be one of {SUPPORTED_DTYPES}; ask for one of them")
    _check_packed(packed, bits, out_features, in_features)


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


def _pack_parameters(parameters: Tensor) -> Tensor:
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
    _check_packed(packed, bits, out_features, in_features)
    return QuantizedWeight(
        codes=_unpack_codes(packed.codes, bits, out_features, in_features),
        scales=_unpack_parameters(packed.scales, out_features),
        zeros=None if symmetric else _unpack_parameters(packed.zeros, out_features),
        bits=bits,
    )


# ---- the operators ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("autoq", "DEF")
_library.define(
    "linear(Tensor input, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, int bits, int out_features, "
    "str mode='exact') -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "dequantize(Tensor codes, Tensor scales, Tensor zeros, int bits, int out_features, int in_features, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_library.define(
    "embedding(Tensor ids, Tensor codes, Tensor scales, Tensor zeros, int bits, int num_embeddings, "
    "int embedding_dim, ScalarType dtype) -> Tensor"
)
_library.define("dense_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


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


def _reference_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    packed = PackedWeight(codes, scales, zeros)
    _check_dequantize(packed, bits, out_features, in_features, dtype)
    _warn_once(codes.device)
    return quantized.dequantize(unpack(packed, bits, out_features, in_features, symmetric=False), dtype)


def _reference_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    mode: str = "exact",
) -> Tensor:
    """Dequantizes panels of output rows and multiplies with torch, on the CPU in fp32, else in the input's dtype.

    In either mode, since neither the precision nor the time of mode int8 would come of it.
    """
    _check_linear(input, PackedWeight(codes, scales, zeros), bias, bits, out_features, mode)
    in_features = input.shape[-1]
    compute = torch.float32 if input.device.type == "cpu" else input.dtype
    columns = input.to(compute)
    step = max(1, _REFERENCE_PANEL // (in_features * LANES))
    panels = []
    for block in range(0, codes.shape[0], step):
        part = slice(block, block + step)
        rows = min(out_features, (block + step) * LANES) - block * LANES
        dense = _dequantize(codes[part], scales[part], zeros[part], bits, rows, in_features, compute)
        panel_bias = None if bias is None else bias[block * LANES : block * LANES + rows].to(compute)
        panels.append(functional.linear(columns, dense, panel_bias).to(input.dtype))
    return torch.cat(panels, dim=-1)


def _fake_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    _check_dequantize(PackedWeight(codes, scales, zeros), bits, out_features, in_features, dtype)
    return codes.new_empty((out_features, in_features), dtype=dtype)


def _fake_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    mode: str = "exact",
) -> Tensor:
    _check_linear(input, PackedWeight(codes, scales, zeros), bias, bits, out_features, mode)
    return input.new_empty((*input.shape[:-1], out_features))


def _check_embedding(ids: Tensor, packed: PackedWeight, bits: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    _check_dequantize(packed, bits, rows, columns, dtype)
    if ids.dtype not in (torch.int64, torch.int32):
        raise OperatorError(f"ids are {ids.dtype} but must be torch.int64 or torch.int32; convert them")
    if ids.device != packed.codes.device:
        raise OperatorError(f"ids are on {ids.device} but the weight on {packed.codes.device}; move one of them")


def _reference_embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_embedding(ids, PackedWeight(codes, scales, zeros), bits, num_embeddings, embedding_dim, dtype)
    rows = ids.flatten()
    if not rows.numel():
        return scales.new_empty((*ids.shape, embedding_dim), dtype=dtype)
    if ids.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < num_embeddings:
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise OperatorError(f"the id {wrong} is not one of {num_embeddings} tokens; use the tokenizer of this model")
    # The rows become a weight of their own, which the kernels dequantize.
    padded = functional.pad(rows, (0, -rows.numel() % LANES))
    blocks, lanes = padded // LANES, padded % LANES
    words = codes[blocks, :, :, lanes].reshape(-1, LANES, *codes.shape[1:3]).permute(0, 2, 3, 1).contiguous()
    parameters = (_pack_parameters(part[blocks, :, lanes]) for part in (scales, zeros))
    dense = _dequantize(words, *parameters, bits, rows.numel(), embedding_dim, dtype)
    return dense.view(*ids.shape, embedding_dim)


def _fake_embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_embedding(ids, PackedWeight(codes, scales, zeros), bits, num_embeddings, embedding_dim, dtype)
    return codes.new_empty((*ids.shape, embedding_dim), dtype=dtype)


def _reference_dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(input, weight, bias)


def _fake_dense_linear(input: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scales, zeros, _, bits, out_features, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.bits, ctx.out_features, ctx.in_features = bits, out_features, input.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient to the input, through a weight that is dense only while it is used, and to the bias."""
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = _dequantize(*ctx.saved_tensors, ctx.bits, ctx.out_features, ctx.in_features, grad.dtype)
        grad_input = grad @ dense
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0)
    return grad_input, None, None, None, grad_bias, None, None, None


_library.impl("dequantize", _reference_dequantize, "CompositeExplicitAutograd")
_library.impl("linear", _reference_linear, "CompositeExplicitAutograd")
_library.impl("embedding", _reference_embedding, "CompositeExplicitAutograd")
_library.impl("dense_linear", _reference_dense_linear, "CompositeExplicitAutograd")
torch.library.register_fake("autoq::dequantize", _fake_dequantize, lib=_library)
torch.library.register_fake("autoq::linear", _fake_linear, lib=_library)
torch.library.register_fake("autoq::embedding", _fake_embedding, lib=_library)
torch.library.register_fake("autoq::dense_linear", _fake_dense_linear, lib=_library)
torch.library.register_autograd("autoq::linear", _linear_backward, setup_context=_save_for_backward, lib=_library)
_extension_problem = _load_extension()

_dequantize = torch.ops.autoq.dequantize.default
_linear = torch.ops.autoq.linear.default
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def linear(
    input: Tensor, packed: PackedWeight, bias: Tensor | None, bits: int, out_features: int, mode: str = "exact"
) -> Tensor:
    """`input @ W.T + bias` for a packed weight W `[out_features, in]`.

    input: fp32, bf16 or fp16 `[..., in]`, any number of rows.
    bias: the input's dtype, `[out_features]`, or None.
    mode: what becomes of the input where there are many rows (more than 8, with AMX 16). "exact" keeps 13 bits or
        more of bf16 and fp16 inputs below the largest value of a group, of fp32 inputs 30; "int8" rounds them to 8 bits
        in blocks of 64, outliers excepted, which some processors multiply faster. With fewer rows, either keeps 14
        bits, 22 where there are outliers (fp32: 30). On a GPU both modes are the same.

    Returns `[..., out_features]` in the input's dtype, accumulated in fp32. Differentiable in the input and the bias.

    Raises OperatorError when a tensor has the wrong shape, dtype or device, or when there is no such mode.
    """
    try:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _linear(input, packed.codes, packed.scales, packed.zeros, bias, bits, out_features, mode)
        # Without gradients the autograd layer, which is Python and costs as much as the rest of the call, is skipped.
        with _below_autograd():
            return _linear(input, packed.codes, packed.scales, packed.zeros, bias, bits, out_features, mode)
    except RuntimeError:
        # The kernels check everything themselves; only when one refuses is the time spent to say what was wrong.
        _check_linear(input, packed, bias, bits, out_features, mode)
        raise


def dequantize(
    packed: PackedWeight, bits: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense weight `(q - z) * s`, `[out_features, in_features]`, computed in fp32 and rounded once to `dtype`.

    Raises OperatorError when a tensor has the wrong shape, dtype or device.
    """
    try:
        return _dequantize(packed.codes, packed.scales, packed.zeros, bits, out_features, in_features, dtype)
    except RuntimeError:
        _check_dequantize(packed, bits, out_features, in_features, dtype)
        raise


def has_units(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has units for products in a dtype: few processors have them for fp16, older ones none for
    bf16, and torch's products then take many times as long as in fp32."""
    name = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}.get(dtype)
    if name is None or device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())


def dense_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, by our kernel where that is faster: on a CPU, without gradients, for few rows
    (these take as long as reading the weight), or for a dtype that the processor has no units for. Sums are in fp32.

    input: fp32, bf16 or fp16 `[..., in]`; weight: `[out, in]` and bias: `[out]` or None, of its dtype.
    Returns `[..., out]` in that dtype. Raises what torch does where shapes or dtypes do not fit.
    """
    rows = input.numel() // max(1, weight.shape[1])
    ours = (
        input.device.type == "cpu"
        and input.dtype == weight.dtype in SUPPORTED_DTYPES
        and (rows <= _FEW_DENSE_ROWS or not has_units(input.dtype, input.device))
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
    function = torch.ops.autoq.dense_linear.default if ours else functional.linear
    return function(input, weight, bias)


def embedding(
    ids: Tensor, packed: PackedWeight, bits: int, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
) -> Tensor:
    """The rows of a packed weight `[num_embeddings, embedding_dim]` that ids ask for.

    ids: int64 or int32, of any shape.

    Returns `[*ids.shape, embedding_dim]`, computed in fp32 and rounded once to `dtype`.

    Raises OperatorError when a tensor has the wrong shape, dtype or device, and on the CPU for an id out of range.
    """
    return torch.ops.autoq.embedding.default(
        ids, packed.codes, packed.scales, packed.zeros, bits, num_embeddings, embedding_dim, dtype
    )
