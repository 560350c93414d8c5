"""Error-compensated rounding: GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on a grid that is already chosen.

Weights are rounded one input channel after the other; the error of each is made up for, as far as the inputs'
correlations allow, by those still to be rounded. The scales and zero points stay what the AWQ search made them, so the
order of the channels is free: loud channels come first, while there is most left to compensate with.

GPTQ works on the inverse of the Gram matrix `H`. Here it is Babai's nearest plane (Chen et al., 2025,
arXiv:2507.18553), which gives the same codes: with `H = R R^T`, `R` upper triangular, a weight `W` rounded to
`Q = W + D` errs by `|D R|^2`, and each channel is rounded to make its own column of `D R` small. That takes one
factorization instead of two and an inversion, and leaves `D R`, from which the gradient of the error is one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.quantization.search_ops import compensate_channels
from autoq.quantization.weight import QuantizedWeight

# Share of the mean diagonal added to the Gram matrix: it bounds how far weights move on directions seldom seen.
DAMPING = 0.01
# Channels rounded before the rest of the weight is pulled, by one matrix product.
BLOCK = 128
# Channels whose gradient is made at a time: what is zero in the factor is left out but within so many.
_PANEL = 1024


class Compensator:
    """What the rounding order and the inputs' correlations say, for every weight that reads the same inputs.

    gram: `X X^T` of those inputs, fp32 `[in, in]`.
    """

    def __init__(self, gram: Tensor) -> None:
        diagonal = gram.diagonal()
        # Only ratios matter; the largest entry becomes one, so that nothing over- or underflows.
        self._largest = diagonal.max().clamp(min=torch.finfo(gram.dtype).tiny)
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        backwards = self._order.flip(0)
        self._damping = 0.0
        ordered = gram[backwards][:, backwards].div_(self._largest)
        damping = max(DAMPING * float(ordered.diagonal().mean()), torch.finfo(gram.dtype).eps)
        # Correlations so strong that fp32 cannot factor the matrix need more damping. It ends: once the damping exceeds
        # the number of channels, the matrix is dominated by its diagonal.
        failed = torch.ones(())
        while failed:
            ordered.diagonal().add_(damping)
            self._damping += damping
            factor, failed = torch.linalg.cholesky_ex(ordered)
            damping *= 10
        del ordered
        # Of the channels in their order: `R` with its columns over its diagonal, and the squares of that.
        self._factor = factor.flip(0, 1)
        del factor
        diagonal = self._factor.diagonal().clone()
        self._factor.div_(diagonal)
        self._energy = diagonal.square_().unsqueeze(1)

    def damped(self, gram: Tensor) -> Tensor:
        """The Gram matrix as it is used here, a copy: over its largest entry, and damped."""
        gram = gram / self._largest
        gram.diagonal().add_(self._damping)
        return gram

    def round(self, weight: Tensor, grid: QuantizedWeight) -> tuple[QuantizedWeight, Tensor]:
        """Codes for a weight on a grid, and what is left of it: `-D R` over the diagonal of `R`, fp32 `[in, out]`, in
        the order of rounding.

        weight: fp32 `[out, in]`.
        grid: its scales and zero points; the codes it holds are replaced.
        """
        group_of = self._order // grid.group_size
        scales, zeros = (part.T.float().contiguous() for part in (grid.scales, grid.explicit_zeros()))
        # One row for each input channel, so that every step works on contiguous memory.
        values = weight.T.contiguous()[self._order]
        pulls, codes = torch.zeros_like(values), torch.empty_like(values)
        for start in range(0, len(values), BLOCK):
            block = slice(start, min(start + BLOCK, len(values)))
            scale, zero, factor = scales[group_of[block]], zeros[group_of[block]], self._factor[block, block]
            compensate_channels(values[block], pulls[block], codes[block], scale, zero, factor, grid.bits)
            pulls[block.stop :].addmm_(self._factor[block, block.stop :].T, values[block])
        natural = torch.empty_like(codes)
        natural[self._order] = codes
        return grid._replace(codes=natural.T.to(torch.uint8).contiguous()), pulls

    def gradient(self, residual: Tensor) -> Tensor:
        """Half of the error's gradient for a rounded weight, `H D^T` with the damped `H`, fp32 `[in, out]`.

        residual: what `round` gave with the codes; written over.
        """
        residual.mul_(self._energy).neg_()
        found = torch.empty_like(residual)
        for start in range(0, len(residual), _PANEL):
            panel = slice(start, start + _PANEL)
            found[self._order[panel]] = self._factor[panel, start:] @ residual[start:]
        return found
