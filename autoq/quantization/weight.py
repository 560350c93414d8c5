"""The quantization arithmetic of the package: what a quantized weight is, and how to get one and back. Only the native
errors of ranges (csrc/cpu/search_kernels.h) say it once more, for speed; tests hold them to this.

A weight `W` of shape `[out, in]` is cut along `in` into groups of `group_size`. Each group has a scale `s` and an
integer zero point `z`, and each weight a code `q` of `bits` bits, so that `W ~ (q - z) * s`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autoq.errors import QuantizationError

SUPPORTED_BITS = (2, 3, 4, 8)

# Scales are stored as fp16. Below its smallest subnormal a scale would be stored as zero.
_SCALE_DTYPE = torch.float16
_SMALLEST_SCALE = 2.0**-24


class QuantizedWeight(NamedTuple):
    """A quantized weight, free of on-disk formats and in-memory layouts.

    codes: uint8 `[out, in]`, values `0 .. 2**bits - 1`.
    scales: floating point `[out, groups]`; fp16 wherever autoq makes one.
    zeros: uint8 `[out, groups]`, or None for symmetric quantization, where the zero point is `2**(bits - 1)`.
    bits: width of a code. It cannot be told from the codes, and a symmetric zero point depends on it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Weights that share a scale, along the input dimension."""
        return self.codes.shape[1] // self.scales.shape[1]

    def explicit_zeros(self) -> Tensor:
        """The zero points as uint8 `[out, groups]`, also when they are implied by symmetry."""
        return symmetric_zeros(self.scales, self.bits) if self.zeros is None else self.zeros


def symmetric_zeros(scales: Tensor, bits: int) -> Tensor:
    """The zero points that symmetric quantization implies, uint8 of the scales' shape."""
    return torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    if size <= 0 or in_features % size:
        raise QuantizationError(
            f"a weight with {in_features} input features cannot be cut into groups of {group_size}; "
            "choose a group size that divides it, or -1 for one group per row"
        )
    return weight.reshape(out_features, in_features // size, size)


def _scales_and_zeros(groups: Tensor, bits: int, zero_point: bool) -> tuple[Tensor, Tensor | None]:
    """Scales (fp32, but representable in fp16) `[out, groups, 1]` and zeros of the same shape, or None."""
    if zero_point:
        # Zero is kept inside the range, so that the zero point fits the code range and a zero weight stays exact.
        low = groups.amin(dim=2, keepdim=True).clamp_(max=0)
        high = groups.amax(dim=2, keepdim=True).clamp_(min=0)
        scales = (high - low) / (2**bits - 1)
    else:
        scales = groups.abs().amax(dim=2, keepdim=True) / max(2 ** (bits - 1) - 1, 1)
    # Codes are chosen for the scale that is stored, not for the one before rounding.
    scales = scales.clamp_(min=_SMALLEST_SCALE).to(_SCALE_DTYPE).float()
    if not zero_point:
        return scales, None
    return scales, (-low / scales).round_().clamp_(0, 2**bits - 1)


def quantize(weight: Tensor, bits: int, group_size: int, zero_point: bool = True) -> QuantizedWeight:
    """Rounds a weight to the nearest codes.

    weight: floating point `[out, in]`, finite. The arithmetic is fp32 (fp64 weights are rounded to fp32 first).
    group_size: a divisor of `in`, or -1 for one group per row.
    zero_point: True for asymmetric ranges, False for symmetric ones (zero point fixed at `2**(bits - 1)`).

    Raises QuantizationError when the group size does not divide, or a weight is NaN, infinite or too large for an
    fp16 scale.
    """
    groups = _grouped(weight.float(), group_size)
    scales, zeros = _scales_and_zeros(groups, bits, zero_point)
    if not torch.isfinite(scales).all():
        problem = "NaN or infinite weights" if not torch.isfinite(weight).all() else "weights too large for fp16 scales"
        raise QuantizationError(f"cannot quantize a weight of shape {tuple(weight.shape)}: it holds {problem}")
    offset = torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros
    codes = nearest_codes(groups, scales, offset, bits)
    return QuantizedWeight(
        codes=codes.to(torch.uint8).reshape(weight.shape),
        scales=scales.squeeze(2).to(_SCALE_DTYPE),
        zeros=None if zeros is None else zeros.squeeze(2).to(torch.uint8),
        bits=bits,
    )


def nearest_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The code of the grid value `(q - z) * s` nearest to each weight; all tensors floating point and broadcastable."""
    return (weight / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `(q - z) * s` as `[out, in]`, computed in fp32 (fp64 when asked for) and rounded once to `dtype`."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    groups = weight.codes.reshape(*weight.scales.shape, weight.group_size).to(compute, copy=True)
    groups.sub_(weight.explicit_zeros().unsqueeze(2)).mul_(weight.scales.unsqueeze(2).to(compute))
    return groups.reshape(weight.codes.shape).to(dtype)


def fake_quantize(weight: Tensor, bits: int, group_size: int, zero_point: bool = True) -> Tensor:
    """`dequantize(quantize(weight))` as fp32, without making the codes: the search's inner loop."""
    groups = _grouped(weight.float(), group_size)
    scales, zeros = _scales_and_zeros(groups, bits, zero_point)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zeros is None else (-zeros, 2**bits - 1 - zeros)
    return (groups / scales).round_().clamp_(low, high).mul_(scales).reshape(weight.shape)
