"""The operators on packed weights (autoq/packed.py): their schemas, their reference in plain torch and their autograd.

Every operator runs on every device through its reference; the native extension (autoq/extension.py) replaces it by fast
kernels where it is installed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoq.errors import OperatorError
from autoq.extension import warn_once
from autoq.packed import LANES, UNIT, PackedWeight, check_packed, pack_parameters, unpack
from autoq.quantization import weight as quantized

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("exact", "int8")

# Up to so many rows our kernel multiplies dense weights faster than torch.
_FEW_DENSE_ROWS = 4

# The reference dequantizes this many weights at a time, so that it needs no dense copy of a large layer.
_REFERENCE_PANEL = 2**25


# ---- checks ----------------------------------------------------------------------------------------------------------


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
    check_packed(packed, bits, out_features, input.shape[-1])
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
    check_packed(packed, bits, out_features, in_features)


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


def _reference_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    packed = PackedWeight(codes, scales, zeros)
    _check_dequantize(packed, bits, out_features, in_features, dtype)
    warn_once(codes.device)
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
    parameters = (pack_parameters(part[blocks, :, lanes]) for part in (scales, zeros))
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
