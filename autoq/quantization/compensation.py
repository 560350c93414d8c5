"""Error-compensated rounding: GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) on a grid that is already chosen.

Weights are rounded one input channel after the other; the error of each is made up for, as far as the inputs'
correlations allow, by those still to be rounded. The scales and zero points stay what the AWQ search made them, so the
order of the channels is free: loud channels come first, while there is most left to compensate with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.quantization.weight import QuantizedWeight, nearest_codes

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
        scales = grid.scales.float().T[group_of]
        zeros = grid.explicit_zeros().float().T[group_of]
        # One row for each input channel, so that every step works on contiguous memory.
        values = weight.T[self._order]
        codes = torch.empty_like(values)
        for start in range(0, len(values), BLOCK):
            block = slice(start, min(start + BLOCK, len(values)))
            errors = self._round_block(values[block], scales[block], zeros[block], codes[block], block, grid.bits)
            values[block.stop :].addmm_(self._update[block, block.stop :].T, errors, alpha=-1)
        natural = torch.empty_like(codes)
        natural[self._order] = codes
        return grid._replace(codes=natural.T.to(torch.uint8).contiguous())

    def _round_block(
        self, values: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, block: slice, bits: int
    ) -> Tensor:
        """Rounds a block of channels into `codes`; returns their errors `[channels, out]`, each over its diagonal."""
        update = self._update[block, block]
        errors = torch.empty_like(values)
        for channel in range(len(values)):
            code = nearest_codes(values[channel], scales[channel], zeros[channel], bits)
            codes[channel] = code
            rounded = (code - zeros[channel]) * scales[channel]
            errors[channel] = (values[channel] - rounded) / update[channel, channel]
            values[channel + 1 :].addr_(update[channel, channel + 1 :], errors[channel], alpha=-1)
        return errors
