"""Whether modules still hold what they held, natively and in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autoq.extension import extension_missing
from autoq.nn import held

NATIVE = extension_missing() is None
CONTENTS = [held._PlainContents, *([held._NativeContents] if NATIVE else [])]
PLACES = [held._PlainPlaces, *([held._NativePlaces] if NATIVE else [])]


@pytest.mark.parametrize("contents_class", CONTENTS)
def test_contents_are_compared_by_identity(contents_class: Any) -> None:
    one, other = [1], [1]
    dicts: list[dict[str, Any]] = [{"a": one, "b": None}, {}]
    contents = contents_class(dicts)
    assert contents.values == [one, None]
    assert contents.are_current()
    dicts[0]["a"] = other  # equal, but another
    assert not contents.are_current()
    dicts[0]["a"] = one
    assert contents.are_current()
    dicts[1]["c"] = one
    assert not contents.are_current()
    del dicts[1]["c"], dicts[0]["b"]
    assert not contents.are_current()


@pytest.mark.parametrize("contents_class", CONTENTS)
def test_only_the_names_that_are_asked_for_matter(contents_class: Any) -> None:
    held_by = {"mode": "exact", "calls": 1}
    contents = contents_class([held_by], ["mode", "forward"])
    held_by["calls"] = 2
    assert contents.are_current()
    held_by["forward"] = print
    assert not contents.are_current()
    del held_by["forward"]
    held_by["mode"] = "int8"
    assert not contents.are_current()


@pytest.mark.parametrize("places_class", PLACES)
def test_tensors_that_move_are_noticed(places_class: Any) -> None:
    tensors = [torch.ones(3), torch.ones(4)]
    places = places_class(tensors)
    tensors[1].mul_(2)
    assert places.are_current()
    tensors[1].data = torch.ones(4)
    assert not places.are_current()


def test_values_matter_unless_they_are_read_anew() -> None:
    linear = nn.Linear(2, 2).requires_grad_(False)
    tensors = held.HeldTensors([linear._parameters], read_anew=[linear.weight])
    linear.weight.zero_()
    assert tensors.are_current()
    linear.bias.zero_()
    assert not tensors.are_current()
    tensors = held.HeldTensors([linear._parameters])
    linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
    assert not tensors.are_current()
