"""Operators around the decoder blocks of a model: a norm, and the tables of rotary positions, in one call each.

In operators of torch they are nine and twelve. When a token is decoded the weights have just driven all else out of the
caches, and each of those then takes ten times as long as it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.architectures.base import NormKind
from autoq.errors import OperatorError
from autoq.ops import SUPPORTED_DTYPES

_library = torch.library.Library("autoq", "FRAGMENT")
_library.define("norm(Tensor input, Tensor? weight, Tensor? bias, int kind, float epsilon) -> Tensor")
_library.define(
    "rotary_tables(Tensor positions, Tensor frequencies, float scale, ScalarType dtype) -> (Tensor, Tensor)"
)


# ---- the reference ---------------------------------------------------------------------------------------------------


def _check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int) -> None:
    if input.dtype not in SUPPORTED_DTYPES or input.dim() < 1:
        raise OperatorError(
            f"norm: the input is {input.dtype} {list(input.shape)} but must be float32, bfloat16 or float16 "
            "[..., features]; convert it"
        )
    if kind not in tuple(NormKind):
        raise OperatorError(f"norm: the kind is {kind} but must be 0, a layer norm, or 1, an RMS norm")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != input.shape[-1:] or vector.dtype != input.dtype):
            raise OperatorError(
                f"norm: the {name} is {vector.dtype} {list(vector.shape)} but must be a vector of {input.shape[-1]} "
                "values in the dtype of the input"
            )


def _check_rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> None:
    if positions.dtype != torch.int64 or positions.dim() != 2:
        raise OperatorError(
            f"rotary_tables: positions are {positions.dtype} {list(positions.shape)} but positions must be int64 "
            "[batch, tokens]"
        )
    if frequencies.dtype != torch.float32 or frequencies.dim() != 1:
        raise OperatorError(
            f"rotary_tables: frequencies are {frequencies.dtype} {list(frequencies.shape)} but frequencies must be "
            "float32 [angles]"
        )
    if dtype not in SUPPORTED_DTYPES:
        raise OperatorError(f"rotary_tables: the dtype must be float32, bfloat16 or float16, not {dtype}")


def normalize(input: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int, epsilon: float) -> Tensor:
    """What `norm` computes, of vectors of any dtype."""
    wide = input.contiguous().float()
    if kind == NormKind.LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    wide = wide if weight is None else wide * weight.float()
    return (wide if bias is None else wide + bias.float()).to(input.dtype)


def reference_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int, epsilon: float) -> Tensor:
    _check_norm(input, weight, bias, kind)
    return normalize(input, weight, bias, kind, epsilon)


def reference_rotary_tables(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_rotary_tables(positions, frequencies, dtype)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _fake_norm(input: Tensor, _weight: Tensor | None, _bias: Tensor | None, _kind: int, _epsilon: float) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _fake_rotary_tables(
    positions: Tensor, frequencies: Tensor, _scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, 2 * frequencies.shape[0])
    cosines, sines = (torch.empty(shape, dtype=dtype, device=positions.device) for _ in range(2))
    return cosines, sines


_library.impl("norm", reference_norm, "CompositeExplicitAutograd")
_library.impl("rotary_tables", reference_rotary_tables, "CompositeExplicitAutograd")
torch.library.register_fake("autoq::norm", _fake_norm, lib=_library)
torch.library.register_fake("autoq::rotary_tables", _fake_rotary_tables, lib=_library)


def norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, epsilon: float) -> Tensor:
    """The norm over the last dimension, computed in fp32 and rounded once.

    input: fp32, bf16 or fp16 `[..., features]`; weight and bias: `[features]`, of its dtype, or None.
    kind: a layer norm, which subtracts the mean first, or an RMS norm (https://arxiv.org/abs/1910.07467).
    epsilon: added to the mean of the squares.

    Returns a contiguous tensor of the input's shape and dtype. Not differentiable.

    Raises OperatorError when a tensor has the wrong shape or dtype, RuntimeError when it is on the wrong device.
    """
    try:
        output: Tensor = torch.ops.autoq.norm.default(input, weight, bias, int(kind), epsilon)
    except RuntimeError:  # only then is the time spent to say what was wrong
        _check_norm(input, weight, bias, kind)
        raise
    return output


def rotary_tables(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`scale * cos(position * frequency)` and the same of the sine, for every frequency and then once more, as
    transformers' models hand them to their blocks (RoFormer, https://arxiv.org/abs/2104.09864).

    positions: int64 `[batch, tokens]`; frequencies: fp32 `[angles]`; dtype: fp32, bf16 or fp16.

    Returns two tensors `[batch, tokens, 2 * angles]`, computed in fp32 and rounded once to `dtype`.

    Raises OperatorError when a tensor has the wrong shape or dtype, RuntimeError when it is on the wrong device.
    """
    try:
        tables: tuple[Tensor, Tensor] = torch.ops.autoq.rotary_tables.default(positions, frequencies, scale, dtype)
    except RuntimeError:
        _check_rotary_tables(positions, frequencies, dtype)
        raise
    return tables
