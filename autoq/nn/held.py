"""Whether modules still hold what they held.

It is asked for every token, when the weights have driven all else out of the caches: natively where that can be, and
otherwise with no bytecode for each tensor.
"""

from __future__ import annotations

import importlib
import itertools
import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoq.extension import extension_missing


class _PlainContents:
    """What dicts hold, or what is under some names in them, and whether they still hold the very same objects."""

    def __init__(self, dicts: Iterable[dict[str, Any]], names: list[str] | None = None) -> None:
        self._dicts, self._names = list(dicts), names
        self._sizes = self._present_sizes()
        self.values = list(self._present_values())

    def are_current(self) -> bool:
        return self._present_sizes() == self._sizes and all(map(operator.is_, self._present_values(), self.values))

    def _present_sizes(self) -> list[int]:
        return list(map(len, self._dicts)) if self._names is None else []

    def _present_values(self) -> Iterable[Any]:
        if self._names is None:
            return itertools.chain.from_iterable(map(dict.values, self._dicts))
        return (held.get(name) for held in self._dicts for name in self._names)


class _NativeContents:
    """The same."""

    def __init__(self, dicts: Iterable[dict[str, Any]], names: list[str] | None = None) -> None:
        self._dicts = list(dicts)
        self.values: list[Any] = []
        self._native = importlib.import_module("autoq._C").Contents(self._dicts, names, self.values)

    def are_current(self) -> bool:
        current: bool = self._native.are_current()
        return current


Contents: Any = _PlainContents if extension_missing() else _NativeContents


class _PlainPlaces:
    """Where tensors are, and whether they still are there."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = self._present_addresses()

    def are_current(self) -> bool:
        return self._present_addresses() == self._addresses

    def _present_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


class _NativePlaces:
    """The same."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._number = torch.ops.autoq.keep_places.default(tensors)
        weakref.finalize(self, torch.ops.autoq.drop_places.default, self._number)

    def are_current(self) -> bool:
        same: bool = torch.ops.autoq.are_in_places.default(self._number)
        return same


def _places(tensors: list[Tensor]) -> Any:
    # Subclasses may know no operators of ours, and where torch swaps a module's tensors, nothing native may hold them.
    plain = any(type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) for tensor in tensors)
    if plain or extension_missing() or torch.__future__.get_swap_module_params_on_conversion():
        return _PlainPlaces(tensors)
    return _NativePlaces(tensors)


class HeldTensors:
    """Tensors of modules, and whether they still are these, with the values they had."""

    def __init__(self, dicts: Iterable[dict[str, Any]], read_anew: Iterable[Tensor] = ()) -> None:
        """dicts: those of the modules that hold the tensors. read_anew: those of which nothing is kept but where they
        are, so that it does not matter when values in them change."""
        self._contents = Contents(dicts)
        self.tensors: list[Tensor] = [tensor for tensor in self._contents.values if tensor is not None]
        devices = {tensor.device for tensor in self.tensors}  # an operator is given tensors of one
        self._places = [_places([each for each in self.tensors if each.device == device]) for device in devices]
        unimportant = {id(tensor) for tensor in read_anew}
        self._versioned = [
            tensor for tensor in self.tensors if not tensor.is_inference() and id(tensor) not in unimportant
        ]
        self._versions = self._present_versions()

    def are_current(self) -> bool:
        # An assignment to `.data` changes the address and no version.
        return (
            self._contents.are_current()
            and all(places.are_current() for places in self._places)
            and self._present_versions() == self._versions
        )

    def _present_versions(self) -> list[int]:
        return list(map(operator.attrgetter("_version"), self._versioned))
