"""Error-compensated rounding: GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on a grid that is already chosen.

Weights are rounded one input channel after the other; the error of each is made up for, as far as the inputs'
correlations allow, by those still to be rounded. The scales and zero points stay what the AWQ search made them, so the
order of the channels is free: loud channels come first, while there is most left to compensate with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.quantization.search_ops import compensate_channels
from autoq.quantization.weight import QuantizedWeight

# Share of the mean diagonal added to the Gram matrix: it bounds how far weights move on directions seldom seen.
DAMPING = 0.01
# Channels rounded before the rest of the weight is updated, by one matrix product.
BLOCK = 128


class Compensator:
    """What the rounding order and the inputs' correlations say, for every weight that reads the same inputs.

    gram: `X X^T` of those inputs, fp32 `[in, in]`.
    """

    def __init__(self, gram: Tensor) -> None:
        diagonal = gram.diagonal()
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        gram = gram[self._order][:, self._order]
        # Only ratios matter; the largest entry becomes one, so that nothing over- or underflows.
        gram = gram / gram.diagonal().max().clamp(min=torch.finfo(gram.dtype).tiny)
        damping = max(DAMPING * float(gram.diagonal().mean()), torch.finfo(gram.dtype).eps)
        # Correlations so strong that fp32 cannot factor the matrix need more damping. It ends: once the damping exceeds
        # the number of channels, the matrix is dominated by its diagonal.
        failed = torch.ones(())
        while failed:
            gram.diagonal().add_(damping)
            factor, failed = torch.linalg.cholesky_ex(gram)
            if not failed:
                # Row j: how the channels behind j make up for an error of one in channel j, scaled by its diagonal.
                self._update, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            damping *= 10

    def round(self, weight: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
        """Codes for a weight on a grid.

        weight: fp32 `[out, in]`.
        grid: its scales and zero points; the codes it holds are replaced.
        """
        group_of = self._order // grid.group_size
        scales, zeros = (part.T.float().contiguous() for part in (grid.scales, grid.explicit_zeros()))
        # One row for each input channel, so that every step works on contiguous memory.
        values = weight.T.contiguous()[self._order]
        codes = torch.empty_like(values)
        for start in range(0, len(values), BLOCK):
            block = slice(start, min(start + BLOCK, len(values)))
            scale, zero, update = scales[group_of[block]], zeros[group_of[block]], self._update[block, block]
            compensate_channels(values[block], codes[block], scale, zero, update, grid.bits)  # leaves the errors
            values[block.stop :].addmm_(self._update[block, block.stop :].T, values[block], alpha=-1)
        natural = torch.empty_like(codes)
        natural[self._order] = codes
        return grid._replace(codes=natural.T.to(torch.uint8).contiguous())
