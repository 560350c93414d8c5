"""Mixed precision: how many bits each linear gets, when all together may have so many on average."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from autoq.errors import QuantizationError


def allocate_bits(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], target_bits: float
) -> dict[str, int]:
    """The width of each linear's codes with a small sum of errors, of at most `target_bits` on average.

    errors: of each linear, by width, what quantizing it to that width costs, in one unit for all.
    sizes: the weights of each linear, by the same names.
    target_bits: the mean width, each linear counted by its weights.

    All linears start at the fewest bits; the widening that lowers the error most for each bit it takes comes first, as
    long as it fits. Widenings are those along the lower convex hull of a linear's errors over its bits, so that no
    step waits behind a worse one. That is the optimum of the relaxation in which the last step may be taken in part
    (Shoham and Gersho, 1988), and off the true one by at most that step.

    Raises QuantizationError when even the fewest bits are more than the target.
    """
    chosen = {name: min(options) for name, options in errors.items()}
    left = target_bits * sum(sizes[name] for name in errors) - sum(chosen[name] * sizes[name] for name in errors)
    if left < 0:
        raise QuantizationError(
            f"target_bits is {target_bits}, but the linears need {_mean(chosen, sizes):.2f} bits on average at the "
            "fewest; choose a larger target, or allow fewer bits"
        )
    waiting = [step for name in errors if (step := _next_step(name, chosen[name], errors[name], sizes[name]))]
    heapq.heapify(waiting)
    while waiting:
        _, name, bits = heapq.heappop(waiting)
        cost = (bits - chosen[name]) * sizes[name]
        if cost > left * (1 + 1e-12):  # the target times the sizes may be rounded down
            continue
        left -= cost
        chosen[name] = bits
        if step := _next_step(name, bits, errors[name], sizes[name]):
            heapq.heappush(waiting, step)
    return chosen


def _next_step(name: str, bits: int, errors: Mapping[int, float], size: int) -> tuple[float, str, int] | None:
    """The widening of a linear that lowers its error most for each bit: minus that gain, the name and the new width."""
    wider = [
        ((errors[width] - errors[bits]) / ((width - bits) * size), name, width) for width in errors if width > bits
    ]
    step = min(wider, default=None)
    return step if step is not None and step[0] < 0 else None


def _mean(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    return sum(width * sizes[name] for name, width in bits.items()) / sum(sizes[name] for name in bits)
