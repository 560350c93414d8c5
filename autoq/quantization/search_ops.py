"""The operators the search and the rounding spend their time in, their reference in plain torch.

As with those of autoq/ops.py, the native extension replaces the references on the CPU (csrc/search.cpp). All work in
fp32 there; anything else is left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.packed import LANES
from autoq.quantization.weight import fake_quantize, nearest_codes

# Beyond this the Gram matrix of a group does not stay in a cache beside its weights, and torch multiplies faster.
_LARGEST_NATIVE_GROUP = 256
# Channels the reference of a descent goes over before the others hear of it, by one matrix product.
_DESCENT_BLOCK = 128

_library = torch.library.Library("autoq", "FRAGMENT")
_library.define(
    "group_errors(Tensor weights, Tensor low, Tensor high, Tensor gram, int bits, bool zero_point) -> Tensor"
)
_library.define(
    "compensate_channels(Tensor(a!) values, Tensor(b!) pulls, Tensor(c!) codes, Tensor scales, Tensor zeros, "
    "Tensor factors, int bits) -> ()"
)
_library.define(
    "descend_channels(Tensor(a!) gradient, Tensor(b!) codes, Tensor scales, Tensor zeros, Tensor gram, int bits) -> ()"
)


def _reference_group_errors(
    weights: Tensor, low: Tensor, high: Tensor, gram: Tensor, bits: int, zero_point: bool
) -> Tensor:
    cut = weights.clamp(low.unsqueeze(2), high.unsqueeze(2)).flatten(0, 1)
    difference = fake_quantize(cut, bits, -1, zero_point).reshape(weights.shape) - weights
    product = torch.bmm(difference.transpose(0, 1), gram).transpose(0, 1)
    return torch.linalg.vecdot(product, difference)


def _fake_group_errors(weights: Tensor, low: Tensor, high: Tensor, gram: Tensor, bits: int, zero_point: bool) -> Tensor:
    return torch.empty_like(low)


def _reference_compensate(
    values: Tensor, pulls: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor, bits: int
) -> None:
    size = len(values) // len(scales)
    for channel, (value, pull) in enumerate(zip(values, pulls, strict=True)):
        scale, zero = scales[channel // size], zeros[channel // size]
        code = nearest_codes(value + pull, scale, zero, bits)
        rounded = (code - zero) * scale
        pull += value - rounded
        value -= rounded
        pulls[channel + 1 :].addr_(factors[channel, channel + 1 :], value)
        codes[channel] = code


def _fake_compensate(
    values: Tensor, pulls: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor, bits: int
) -> None:
    """Works in place."""


def _reference_descend(gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, gram: Tensor, bits: int) -> None:
    size = len(gradient) // len(scales)
    for start in range(0, len(gradient), _DESCENT_BLOCK):
        block = slice(start, min(start + _DESCENT_BLOCK, len(gradient)))
        within, steps = gradient[block].clone(), torch.empty_like(gradient[block])
        for channel in range(start, block.stop):
            scale, zero = scales[channel // size], zeros[channel // size]
            wanted = (codes[channel] - zero) * scale - within[channel - start] / gram[channel, channel]
            code = nearest_codes(wanted, scale, zero, bits)
            steps[channel - start] = (code - codes[channel]) * scale
            within.addr_(gram[block, channel], steps[channel - start])
            codes[channel] = code
        gradient.addmm_(gram[:, block], steps)


def _fake_descend(gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, gram: Tensor, bits: int) -> None:
    """Works in place."""


for _name, _reference, _fake in (
    ("group_errors", _reference_group_errors, _fake_group_errors),
    ("compensate_channels", _reference_compensate, _fake_compensate),
    ("descend_channels", _reference_descend, _fake_descend),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autoq::{_name}", _fake, lib=_library)


def group_errors(weights: Tensor, low: Tensor, high: Tensor, gram: Tensor, bits: int, zero_point: bool) -> Tensor:
    """The error `d^T H d` of each group's own output, if the group is cut to a range and rounded: what the search for
    ranges asks for again and again.

    weights: fp32 or fp64 `[rows, groups, size]`.
    low, high: between which a group is cut, `[rows, groups, 1]`; low at most high.
    gram: the Gram matrices `H` of the groups' inputs, `[groups, size, size]`.
    bits, zero_point: of the rounding, as of `quantize` (autoq/quantization/weight.py).

    Returns `[rows, groups, 1]` in the dtype of the weights.
    """
    arguments = weights, low.squeeze(2), high.squeeze(2), gram, bits, zero_point
    size = weights.shape[2]
    if weights.dtype == torch.float32 and size % LANES == 0 and size <= _LARGEST_NATIVE_GROUP:
        errors: Tensor = torch.ops.autoq.group_errors.default(*arguments)
    else:
        errors = _reference_group_errors(*arguments)
    return errors.unsqueeze(2)


def compensate_channels(
    values: Tensor, pulls: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, factors: Tensor, bits: int
) -> None:
    """Rounds channels one after the other, each pulled to where it makes up for the errors of those before it.

    values: fp32 or fp64 `[channels, out]`, contiguous, the weights; become their errors, what is left after rounding.
    pulls: its shape and dtype, by how much the values move first; becomes the errors of the values that were moved.
    codes: its shape and dtype; receives the codes.
    scales, zeros: `[groups, out]`, of equal groups of the channels.
    factors: `[channels, channels]`; row `i` says by how much an error of one in channel `i` pulls each channel behind.
    """
    arguments = values, pulls, codes, scales, zeros, factors, bits
    if values.dtype != torch.float32:
        _reference_compensate(*arguments)
    else:
        torch.ops.autoq.compensate_channels.default(*arguments)


def descend_channels(gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, gram: Tensor, bits: int) -> None:
    """Sets the codes of channels one after the other, each to the best of its values while the others stay.

    gradient: fp32 or fp64 `[channels, out]`, contiguous, half of the error's gradient, `H D^T`; kept up with the codes.
    codes: its shape and dtype; changed.
    scales, zeros: `[groups, out]`, of equal groups of the channels.
    gram: `H`, symmetric `[channels, channels]`, its diagonal positive.
    """
    arguments = gradient, codes, scales, zeros, gram, bits
    if gradient.dtype != torch.float32:
        _reference_descend(*arguments)
    else:
        torch.ops.autoq.descend_channels.default(*arguments)
