"""Runs a model whose parts are on several devices: every part finds its inputs on the device of its weights.

Hidden states move where one part is on another device than the one before. What all blocks are given beside them (the
mask, the positions) moves once to each device, however many blocks are there. The hooks are torch's own and sit on
whole parts, so that fused blocks stay fused; they look up the device at each call, so that a model moved by `.to` runs
too. Who records a model's forward is told of each boundary (`moved_by`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
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
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from autoq import checkpoint
from autoq.errors import CheckpointError, first_line

# Copies tensors to a device, on which the model goes on.
Move = Callable[[list[Tensor], torch.device], list[Tensor]]


def copy_to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


_move: ContextVar[Move] = ContextVar("move", default=copy_to_device)


@contextmanager
def moved_by(move: Move) -> Iterator[None]:
    """While open, tensors move between the parts of connected models by this function. It is called whenever a part
    begins, with what that needs from other devices, which may be nothing."""
    token = _move.set(move)
    try:
        yield
    finally:
        _move.reset(token)


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
        if is_mover(hook):
            successor.register_forward_pre_hook(hook, with_kwargs=True)


def is_mover(hook: Any) -> bool:
    """Whether a forward pre-hook is one of `connect`, which changes nothing but devices."""
    return isinstance(hook, _MoveInputs)


def disconnect(model: PreTrainedModel) -> None:
    """Undoes `connect`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (_MoveInputs, _MoveOutputs)):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)


class DiskWeights(OffloadedWeightsLoader):
    """Weights by name, read from files when they are asked for."""

    def __getitem__(self, key: str) -> Tensor:
        try:
            tensor: Tensor = super().__getitem__(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{key} cannot be read from the disk any more ({first_line(error)}); this model reads its weights "
                "while it runs: put the files back, or load the model again"
            ) from error
        return tensor


def fetch_from_disk(model: PreTrainedModel, part: str, weights: Mapping[str, Tensor], runner: torch.device) -> None:
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


def weights_of(part: nn.Module) -> Mapping[str, Tensor] | None:
    """What `fetch_from_disk` was given for a part; None if its weights are in memory."""
    hooks: Iterator[Any] = (module._hf_hook for module in part.modules() if has_offloaded_params(module))
    hook = next(hooks, None)
    return None if hook is None else hook.weights_map.dataset


def read_ahead(part: nn.Module) -> None:
    """Has the system read the weights that a part will fetch from a checkpoint while other work is done, where it
    can."""
    for module in part.modules():
        if has_offloaded_params(module):
            hook: Any = module._hf_hook
            index = getattr(hook.weights_map.dataset, "index", {})
            for name in (*module._parameters, *module._buffers):
                entry = index.get(hook.weights_map.prefix + name, {})
                if "range" in entry:
                    checkpoint.read_ahead(Path(entry["safetensors_file"]), *entry["range"])


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
        if device is None:
            return None
        if torch.compiler.is_compiling():
            return _replaced((args, kwargs), lambda tensor: tensor.to(device))
        there: dict[int, Tensor] = {}  # copies, by the identity of their originals
        wanted = []
        for tensor in _tensors((args, kwargs)):
            copy = self._kept_copy(tensor, device)
            if copy is not None:
                there[id(tensor)] = copy
            elif tensor.device != device:
                wanted.append(tensor)
        for tensor, copy in zip(wanted, _move.get()(wanted, device), strict=True):
            there[id(tensor)] = copy
            if _can_be_kept(tensor):
                self._copies.setdefault(tensor, {})[device] = (tensor._version, copy)
        return _replaced((args, kwargs), lambda tensor: there.get(id(tensor), tensor))

    def _device(self, part: nn.Module) -> torch.device | None:
        reference = self._homes.get(part)
        tensor = None if reference is None else reference()
        if tensor is not None:
            return tensor.device
        device, tensor = home_of(part)
        if tensor is not None:
            self._homes[part] = weakref.ref(tensor)
        return device

    def _kept_copy(self, tensor: Tensor, device: torch.device) -> Tensor | None:
        """A copy that is sure to equal its original: nobody wrote to that since."""
        if not _can_be_kept(tensor):
            return None
        version, copy = self._copies.get(tensor, {}).get(device, (None, None))
        return copy if version == tensor._version else None


def _can_be_kept(tensor: Tensor) -> bool:
    """Whether a copy can be used again: it belongs to no graph, and its original's version tells who wrote to that."""
    return not (tensor.requires_grad or tensor.is_inference())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a part's arguments, each once: a cache among them is left alone."""
    found: dict[int, Tensor] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif type(value) in (tuple, list):
            waiting.extend(value)
        elif type(value) is dict:
            waiting.extend(value.values())
    return iter(found.values())


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with other tensors."""
    if isinstance(value, Tensor):
        return replace(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(entry, replace) for entry in value)
    if type(value) is dict:
        return {name: _replaced(entry, replace) for name, entry in value.items()}
    return value


class _MoveOutputs:
    """A forward hook for a whole model: what comes out is on the device of what went in."""

    def __init__(self, skipped: Any) -> None:
        self._skipped = skipped

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        device = find_device((args, dict(kwargs)))
        return output if device is None else send_to_device(output, device, skip_keys=self._skipped)
