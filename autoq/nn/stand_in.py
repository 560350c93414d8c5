"""A forward that takes the place of a module's own. The modules of a model stay as transformers made them, with their
names, their tensors and their hooks."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class StandIn:
    """What a module has in the place of its forward, and which hands to that what it does not do itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # which holds this: a model is gone when the last reference to it is

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])

    @property
    def module(self) -> Any:
        """Of many types, most of whose attributes have none."""
        module = self._module()
        assert module is not None
        return module

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward makes."""
        return type(self.module).forward(self.module, *args, **kwargs)


def is_plain_call(input: Tensor) -> bool:
    """Whether nobody compiles or traces what is done to an input, or changes its dtype on the way."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or torch.is_autocast_enabled(input.device.type))
