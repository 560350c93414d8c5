"""Runs a model whose parts are on several devices: every part finds its inputs on the device of its weights.

Hidden states move where one part is on another device than the one before. What all blocks are given beside them (the
mask, the positions) moves once to each device, however many blocks are there. The hooks are torch's own and sit on
whole parts, so that fused blocks stay fused; they look up the device at each call, so that a model moved by `.to` runs
too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
from accelerate.utils import (
    OffloadedWeightsLoader,
    align_module_device,
    find_device,
    has_offloaded_params,
    send_to_device,
)
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from autoq.errors import CheckpointError


def connect(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Has every part of a model get its inputs on its device, and the outputs come back to that of the inputs.

    parts: the names of modules; anything else that moves tensors between devices has to be gone.
    """
    disconnect(model)
    move = _MoveInputs()
    for name in parts:
        model.get_submodule(name).register_forward_pre_hook(move, with_kwargs=True)
    model.register_forward_hook(_MoveOutputs(model._skip_keys_device_placement), with_kwargs=True)


def hand_over(part: nn.Module, successor: nn.Module) -> None:
    """Has the module that takes the place of a connected part get its inputs as that did."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, _MoveInputs):
            successor.register_forward_pre_hook(hook, with_kwargs=True)


def disconnect(model: PreTrainedModel) -> None:
    """Undoes `connect`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (_MoveInputs, _MoveOutputs)):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)


def fetch_from_disk(model: PreTrainedModel, part: str, weights: OffloadedWeightsLoader, runner: torch.device) -> None:
    """Has the weights of a part, which are on the meta device, fetched linear by linear while it runs on `runner`."""
    attach_align_device_hook(
        model.get_submodule(part),
        execution_device=runner,
        offload=True,
        weights_map=weights,
        offload_buffers=True,
        module_name=part,
        skip_keys=model._skip_keys_device_placement,
    )


@contextmanager
def in_memory(module: nn.Module, name: str) -> Iterator[None]:
    """While open, a module's own tensors are in memory: on the CPU, if they are offloaded."""
    held = [*module._parameters.values(), *module._buffers.values()]
    if not any(tensor is not None and tensor.is_meta for tensor in held):
        yield
    elif has_offloaded_params(module):
        with align_module_device(module, torch.device("cpu")):
            yield
    else:
        raise CheckpointError(f"{name} is not in memory, nor is it known where it is; load the model again")


def bring(module: nn.Module, name: str) -> None:
    """Reads the offloaded tensors of a module and of those within it into the CPU's memory, to stay there."""
    for leaf, inner in module.named_modules():
        if has_offloaded_params(inner):
            with in_memory(inner, f"{name}.{leaf}"):
                held = {**inner._parameters, **inner._buffers}
                # A copy: what was fetched may be a view of the file.
                fetched = {key: None if tensor is None else tensor.detach().clone() for key, tensor in held.items()}
            _remove_hook(inner)
            for key, tensor in fetched.items():
                if key in inner._parameters and tensor is not None:
                    inner._parameters[key] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
                else:
                    inner._buffers[key] = tensor


def remove_hooks(module: nn.Module) -> None:
    """Removes the hooks of accelerate from a module and those within it."""
    for inner in module.modules():
        _remove_hook(inner)


def _remove_hook(module: nn.Module) -> None:
    hooked = hasattr(module, "_hf_hook")
    remove_hook_from_module(module)
    # What that leaves behind is a reference of the module to itself, which keeps its weights in memory until the
    # garbage collector comes by.
    if hooked and module.__dict__.get("forward") == type(module).forward.__get__(module):
        del module.__dict__["forward"]


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are fetched only while they are used."""
    return any(has_offloaded_params(module) for module in model.modules())


def home_of(part: nn.Module) -> tuple[torch.device | None, Tensor | None]:
    """The device a part runs on, and the tensor that says so, if its weights are in memory."""
    for module in part.modules():
        if has_offloaded_params(module):
            hook: Any = module._hf_hook
            return torch.device(hook.execution_device), None
    tensor = next(chain(part.parameters(), part.buffers()), None)
    return (None, None) if tensor is None else (tensor.device, tensor)


class _MoveInputs:
    """A forward pre-hook for all parts of a model: moves tensors to the device of the part."""

    def __init__(self) -> None:
        self._homes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()
        # What moved already, with the version of the original, for as long as that lives.
        self._copies: Any = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the model finds its own

    def __setstate__(self, _state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self._device(part)
        if device is not None:
            return self._moved(args, device), self._moved(kwargs, device)
        return None

    def _device(self, part: nn.Module) -> torch.device | None:
        reference = self._homes.get(part)
        tensor = None if reference is None else reference()
        if tensor is not None:
            return tensor.device
        device, tensor = home_of(part)
        if tensor is not None:
            self._homes[part] = weakref.ref(tensor)
        return device

    def _moved(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value if value.device == device else self._copy(value, device)
        if type(value) in (tuple, list):
            return type(value)(self._moved(entry, device) for entry in value)
        if type(value) is dict:
            return {name: self._moved(entry, device) for name, entry in value.items()}
        return value

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        # A copy is used again only while it is sure to equal its original: it belongs to no graph, and its version
        # tells whether somebody wrote to it.
        if tensor.requires_grad or tensor.is_inference() or torch.compiler.is_compiling():
            return tensor.to(device)
        copies = self._copies.setdefault(tensor, {})
        version, copy = copies.get(device, (None, None))
        if copy is None or version != tensor._version:
            copy = tensor.to(device)
            copies[device] = (tensor._version, copy)
        return copy


class _MoveOutputs:
    """A forward hook for a whole model: what comes out is on the device of what went in."""

    def __init__(self, skipped: Any) -> None:
        self._skipped = skipped

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        device = find_device((args, dict(kwargs)))
        return output if device is None else send_to_device(output, device, skip_keys=self._skipped)
