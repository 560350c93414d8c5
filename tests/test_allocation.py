"""Bits under a budget, against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from autoq.errors import QuantizationError
from autoq.quantization.allocation import allocate_bits

WIDTHS = (2, 3, 4, 8)


def _case(seed: int, count: int = 6) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    draw = random.Random(seed)
    sizes = {f"linear{i}": draw.choice([100, 300, 400]) for i in range(count)}
    errors = {name: {bits: draw.uniform(0.1, 9) * 4.0**-bits for bits in WIDTHS} for name in sizes}
    return errors, sizes


def _total(errors: dict[str, dict[int, float]], bits: dict[str, int]) -> float:
    return sum(errors[name][width] for name, width in bits.items())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", [2.0, 2.6, 3.25, 4.25, 8.0])
def test_it_keeps_the_budget_and_is_near_the_best_choice(seed: int, target: float) -> None:
    errors, sizes = _case(seed)
    budget = target * sum(sizes.values())
    found = allocate_bits(errors, sizes, target)
    assert sum(found[name] * sizes[name] for name in sizes) <= budget * (1 + 1e-9)
    choices = [dict(zip(sizes, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=len(sizes))]
    fitting = [choice for choice in choices if sum(choice[name] * sizes[name] for name in sizes) <= budget]
    best = min(_total(errors, choice) for choice in fitting)
    # One step of one linear may not have fitted.
    largest = max(max(options.values()) - min(options.values()) for options in errors.values())
    assert best <= _total(errors, found) * (1 + 1e-9)
    assert _total(errors, found) <= best + largest


def test_the_sensitive_linear_gets_the_bits() -> None:
    errors = {"a": {3: 100.0, 4: 25.0}, "b": {3: 1.0, 4: 0.25}}
    assert allocate_bits(errors, {"a": 64, "b": 64}, 3.5) == {"a": 4, "b": 3}
    assert allocate_bits(errors, {"a": 64, "b": 64}, 4) == {"a": 4, "b": 4}


def test_a_poor_middle_step_is_passed_over() -> None:
    errors = {"a": {2: 10.0, 3: 9.9, 4: 0.0}, "b": {2: 3.0, 3: 1.0, 4: 0.9}}
    assert allocate_bits(errors, {"a": 1, "b": 1}, 3) == {"a": 4, "b": 2}


def test_bits_that_gain_nothing_are_not_spent() -> None:
    assert allocate_bits({"a": {3: 1.0, 4: 1.0}}, {"a": 8}, 4) == {"a": 3}


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"need 3\.00 bits on average"):
        allocate_bits({"a": {3: 1.0, 4: 0.5}}, {"a": 8}, 2.5)
