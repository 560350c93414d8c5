"""Runs the norm behind the decoder blocks, and the rotary positions before them, in one native call each.

As with the blocks (`autoq.nn.block`), the modules stay as transformers made them, and only their forward is replaced.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.architectures.base import Architecture, NormKind
from autoq.model_ops import norm, rotary_tables
from autoq.ops import SUPPORTED_DTYPES

# Rotary positions whose frequencies do not depend on how many positions there are.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


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


class _FusedNorm(StandIn):
    """Of an RMS norm."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module = self.module
        weight: Tensor = module.weight
        if (
            not is_plain_call(hidden_states)
            or (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad))
            or not hidden_states.dtype == weight.dtype in SUPPORTED_DTYPES
            or hidden_states.device != weight.device
            or not weight.is_contiguous()
        ):
            own: Tensor = self.own(hidden_states)
            return own
        return norm(hidden_states, weight, None, NormKind.RMS, module.variance_epsilon)


class _FusedRotary(StandIn):
    """Of rotary positions."""

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        module = self.module
        frequencies: Tensor = module.inv_freq
        if (
            args
            or kwargs
            or torch.is_grad_enabled()  # what is trained is computed as it always was
            or not is_plain_call(x)
            or x.dtype not in SUPPORTED_DTYPES
            or position_ids.dim() != 2
            or position_ids.dtype != torch.int64
            or frequencies.dtype != torch.float32
            or not x.device == position_ids.device == frequencies.device
        ):
            own: tuple[Tensor, Tensor] = self.own(x, position_ids, *args, **kwargs)
            return own
        return rotary_tables(position_ids, frequencies, float(module.attention_scaling), x.dtype)


def fuse_around(model: PreTrainedModel, architecture: Architecture) -> None:
    """Replaces the forward of what is around the blocks of a model, where there is an operator for it."""
    for name, stand_in, is_known in (
        (architecture.final_norm, _FusedNorm, _is_known_norm),
        (architecture.rotary, _FusedRotary, _is_known_rotary),
    ):
        module = None if name is None else model.get_submodule(name)
        if module is None or not is_known(module):
            continue
        # Others' classes, and forwards of the module's own instance, may do anything.
        if type(module).__module__.startswith("transformers.") and "forward" not in module.__dict__:
            module.forward = stand_in(module)


def _is_known_norm(module: nn.Module) -> bool:
    tensors = [*module._parameters, *module._buffers]
    return tensors == ["weight"] and isinstance(getattr(module, "variance_epsilon", None), float)


def _is_known_rotary(module: nn.Module) -> bool:
    fixed = getattr(module, "rope_type", None) in _FIXED_ROTARY
    return fixed and hasattr(module, "inv_freq") and hasattr(module, "attention_scaling")
