"""Whether modules still hold what they held.

It is asked for every token, when the weights have driven all else out of the caches: no bytecode runs for each tensor.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Contents:
    """What dicts hold, and whether they still hold the very same objects; empty ones are not looked at."""

    def __init__(self, dicts: Iterable[dict[str, Any]]) -> None:
        self._dicts = [held for held in dicts if held]
        self.values = list(self._present_values())

    def are_current(self) -> bool:
        return sum(map(len, self._dicts)) == len(self.values) and all(
            map(operator.is_, self._present_values(), self.values)
        )

    def _present_values(self) -> Iterable[Any]:
        return itertools.chain.from_iterable(map(dict.values, self._dicts))


class HeldTensors:
    """Tensors of modules, and whether they still are these, with the values they had."""

    def __init__(self, dicts: Iterable[dict[str, Any]]) -> None:
        """dicts: those of the modules that hold the tensors."""
        self._contents = Contents(dicts)
        self.tensors: list[Tensor] = [tensor for tensor in self._contents.values if tensor is not None]
        self._versioned = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._versions = self._present_versions()
        self._addresses = self._present_addresses()

    def are_current(self) -> bool:
        # An assignment to `.data` changes the address and no version.
        return (
            self._contents.are_current()
            and self._present_addresses() == self._addresses
            and self._present_versions() == self._versions
        )

    def _present_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def _present_versions(self) -> list[int]:
        return list(map(operator.attrgetter("_version"), self._versioned))
