"""Runs the norm behind the decoder blocks, and the rotary positions before them, in one native call each.

As with the blocks (`autoq.nn.block`), only the forward of the modules is replaced, and what the operators do not do
goes through their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.architectures.base import Architecture, NormKind
from autoq.model_ops import norm, rotary_tables
from autoq.nn.stand_in import StandIn, is_plain_call
from autoq.ops import SUPPORTED_DTYPES

# Rotary positions whose frequencies do not depend on how many positions there are.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class _FusedNorm(StandIn):
    """The forward of an RMS norm in one operator."""

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
    """The forward of a module that makes rotary tables, in one operator."""

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
    modules = dict(model.named_modules())
    for path, stand_in, is_known in (
        (architecture.final_norm, _FusedNorm, _is_known_norm),
        (architecture.rotary, _FusedRotary, _is_known_rotary),
    ):
        module = modules.get(path or "")
        if path is not None and module is not None and is_known(module) and _is_untouched(module):
            module.forward = stand_in(module)


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module does what transformers wrote: others' classes and forwards may do anything."""
    written = (type(module), type(module).forward)
    return "forward" not in module.__dict__ and all(each.__module__.startswith("transformers.") for each in written)


def _is_known_norm(module: nn.Module) -> bool:
    tensors = [*module._parameters, *module._buffers]
    return tensors == ["weight"] and isinstance(getattr(module, "variance_epsilon", None), float)


def _is_known_rotary(module: nn.Module) -> bool:
    fixed = getattr(module, "rope_type", None) in _FIXED_ROTARY
    return fixed and hasattr(module, "inv_freq") and hasattr(module, "attention_scaling")
