"""A decoding step as one CUDA graph: recorded once, replayed for every token.

A step of a model with fused blocks is some hundreds of kernels of a few microseconds; started from Python one by one,
they take longer to start than to run. A graph starts them all at once, but always with the same pointers and the same
numbers. So whatever changes from token to token is kept on the device, at a fixed address: the token, its position,
the mask, and the length of the cache, which the operator of the blocks and transformers' own code then read from a
tensor, as they do with transformers' static cache.

`StepGraphs` takes the place of the model's forward. It replays what it can and hands everything else to the model's own
forward, with the same result: prompts, gradients, hooks, other caches, whatever the fused blocks themselves cannot run.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from autoq.architectures import architecture_of, known_model_types
from autoq.nn.block import FusedForward, HeldTensors, is_watched
from autoq.nn.cache import KVBuffers, KVLayer
from autoq.nn.linear import QuantLinear

# What the step is given, each in a buffer of its own; whatever else a call asks for is not in the graph.
_INPUTS = ("input_ids", "attention_mask", "position_ids")


# ---- recording -------------------------------------------------------------------------------------------------------


class Recording(Protocol):
    """A function that was recorded: `replay` does again to its tensors what the function did to them."""

    output: Any  # of the function, with tensors that `replay` fills

    def replay(self) -> None: ...


class CudaRecording:
    """A CUDA graph.

    What the function does on the host is done once, while recording. Nothing may wait for the GPU in it.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            run()  # libraries set themselves up at the first call
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # a recording has memory of its own, and cannot take what is kept for others
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = run()
            finally:
                self._graph.capture_end()
        current.wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()


# How a step is recorded on a type of device; on others it is not.
RECORDERS: dict[str, Callable[[Callable[[], Any], torch.device], Recording]] = {"cuda": CudaRecording}


class CannotBeRecorded(Exception):
    """A step waits for the device, or brings values from the host to it, which a graph cannot do again."""


class _Rehearsal(TorchDispatchMode):
    """Runs a step and raises CannotBeRecorded where a graph could not hold it, before a recording breaks there."""

    _WAITING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in self._WAITING:
            raise CannotBeRecorded(name)
        result = func(*args, **(kwargs or {}))
        copies = name in ("aten::_to_copy", "aten::copy_")
        source = args[1] if name == "aten::copy_" else args[0] if copies else None
        if copies and isinstance(source, Tensor) and source.device != result.device:
            raise CannotBeRecorded(f"{name} from {source.device} to {result.device}")
        if name == "aten::lift_fresh" and result.is_cuda:
            raise CannotBeRecorded("a tensor made of numbers of the host")
        return result


def idle_limit(device: torch.device) -> int:
    """The bytes of keys and values that may wait for the next cache: prompts need memory too."""
    return torch.cuda.get_device_properties(device).total_memory // 10 if device.type == "cuda" else 2**40


# ---- what stays where it is ------------------------------------------------------------------------------------------


class _StaticLayer(KVLayer):
    """The cache of one block as a graph sees it: full size, with its length on the device."""

    length: Tensor

    def __init__(self, buffers: KVBuffers, length: Tensor, masked: bool) -> None:
        super().__init__(buffers.key_scales is not None)
        self._buffers, self.length = buffers, length
        self.is_initialized = True
        self.is_compileable = masked  # transformers then makes the mask whatever its values, without looking at them

    def reserve(self, like: Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[KVBuffers, int]:
        assert self._buffers is not None
        return self._buffers, self._buffers.capacity - tokens

    def advance(self, tokens: int) -> None:
        """Nothing: the length is set before every replay."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise CannotBeRecorded("a block that does not run fused")

    def get_seq_length(self) -> Any:
        return self.length

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        assert self._buffers is not None
        return self._buffers.capacity, 0


class _Slot:
    """Keys and values of all blocks at fixed addresses, the inputs of a step, and the recordings made of these.

    A slot belongs to the cache whose layers hold its buffers. When that is gone, or has gone over to others, another
    cache can move in, and the recordings are used again.
    """

    def __init__(self, layers: list[KVLayer]) -> None:
        self.buffers: list[KVBuffers] = [layer.lend() for layer in layers]
        self._owner = weakref.ref(layers[0])
        keys = self.buffers[0].keys
        self.batch, self.capacity, self.device = keys.shape[0], self.buffers[0].capacity, keys.device
        self.bytes = sum(tensor.nbytes for buffers in self.buffers for tensor in buffers if tensor is not None)
        with torch.inference_mode(False):
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.inputs: dict[str, Tensor] = {}
        self.recordings: dict[tuple[Any, ...], Recording] = {}

    def belongs_to(self, layers: list[KVLayer]) -> bool:
        return all(layer.holds(buffers) for layer, buffers in zip(layers, self.buffers, strict=True))

    def is_free(self) -> bool:
        owner = self._owner()
        return owner is None or not owner.holds(self.buffers[0])

    def fits(self, layers: list[KVLayer], length: int) -> bool:
        """Whether these layers could move in with a token more than they hold."""
        return self.capacity > length and all(
            layer.fits(buffers) for layer, buffers in zip(layers, self.buffers, strict=True)
        )

    def take_in(self, layers: list[KVLayer]) -> None:
        for layer, buffers in zip(layers, self.buffers, strict=True):
            layer.move_to(buffers)
        self._owner = weakref.ref(layers[0])

    def fill(self, inputs: dict[str, Tensor], length: int) -> None:
        """Puts a step's inputs where the recordings read them."""
        self.length.fill_(length)
        for name, value in inputs.items():
            if name not in self.inputs:
                columns = self.capacity if name == "attention_mask" else 1
                with torch.inference_mode(False):
                    # What is behind the tokens is not padding; that it is yet to come is known from the length.
                    self.inputs[name] = torch.ones(self.batch, columns, dtype=torch.int64, device=self.device)
            self.inputs[name][:, : value.shape[1]].copy_(value)

    def cache(self, masked: bool) -> DynamicCache:
        cache = DynamicCache()
        cache.layers = [_StaticLayer(buffers, self.length, masked) for buffers in self.buffers]
        return cache


class _Snapshot:
    """What a recording was made of: the modules, their tensors, and that nobody watches or changes what they do.

    It is looked at for every token, so it is flat: a thousand tensors take some hundred microseconds.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config, self._attention = model.config, model.config._attn_implementation
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        places: list[tuple[dict[str, Any], str]] = []
        self._visit(model, places)
        self._held = HeldTensors(places)
        # With the memory of each, which a recording uses: it must not be gone before a change is noticed.
        self._memory = [tensor.detach() for tensor in self._held.tensors]
        self._linears = [module for _, _, module in self._modules if isinstance(module, QuantLinear)]
        self._modes = [linear.mode for linear in self._linears]
        blocks = list(architecture_of(model.config).decoder_blocks(model))
        self._forwards = {block: block.__dict__.get("forward") for block in blocks}
        fused = [forward for forward in self._forwards.values() if isinstance(forward, FusedForward)]
        self._memory += [tensor for forward in fused for tensor in forward.tensors]  # merged biases among them
        self._can_be_recorded = len({tensor.device for tensor in self._held.tensors}) == 1 and all(
            isinstance(forward, FusedForward) for forward in self._forwards.values()
        )

    def _visit(self, module: nn.Module, places: list[tuple[dict[str, Any], str]]) -> None:
        for leaf, child in module._modules.items():
            if child is not None:
                self._modules.append((module._modules, leaf, child))
                self._visit(child, places)
        for tensors in (module._parameters, module._buffers):
            places += [(tensors, name) for name in tensors]

    def is_current(self) -> bool:
        if not self._can_be_recorded or nn.modules.module._has_any_global_hook():
            return False
        for siblings, leaf, module in self._modules:
            if siblings.get(leaf) is not module or module.training:
                return False
            if (module._forward_hooks or module._forward_pre_hooks) and is_watched(module):
                return False
            if "forward" in module.__dict__ and module.forward is not self._forwards.get(module):
                return False
        return (
            self._held.are_current()
            and [linear.mode for linear in self._linears] == self._modes
            and self._config._attn_implementation == self._attention
        )


# ---- the forward -----------------------------------------------------------------------------------------------------


def record_steps(model: PreTrainedModel) -> None:
    """Replaces the forward of a model by one that records its decoding steps, where its blocks run fused on a GPU."""
    if model.config.model_type in known_model_types() and "forward" not in model.__dict__:
        model.forward = StepGraphs(model)


class StepGraphs:
    """The forward of a model: recorded steps where these give what its own forward would."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)  # which holds this
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Drops the recordings, with the caches and the weights that they hold."""
        self._slots: list[_Slot] = []
        self._masks_wanted = False  # the family's forward waits for the device where it is given no mask
        self._impossible = False
        self._snapshot: _Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])
        self._lock = threading.Lock()
        self.forget()

    @property
    def __signature__(self) -> inspect.Signature:
        model = self._model()
        assert model is not None
        return inspect.signature(type(model).forward.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or model.training:
            return type(model).forward(model, *args, **kwargs)
        output = self._step(model, args, kwargs)
        if output is not None:
            return output
        with self._lock:
            self._slots = [slot for slot in self._slots if not slot.is_free() or slot.bytes <= idle_limit(slot.device)]
        return type(model).forward(model, *args, **kwargs)

    # ---- whether this call is a step ----

    def _step(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for one more token of every sequence, or None where its own forward has to say."""
        inputs = self._inputs(model, args, kwargs)
        if inputs is None:
            self._impossible = False  # so that it is tried again after the next prompt
            return None
        if self._impossible:
            return None
        layers = _layers(kwargs.get("past_key_values"))
        if not layers:
            return None
        length = layers[0].get_seq_length()
        batch = inputs["input_ids"].shape[0]
        if any(layer.get_seq_length() != length or not layer.holds_sequences(batch) for layer in layers):
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and tuple(mask.shape) != (batch, length + 1):
            return None
        if mask is None and self._masks_wanted:
            inputs["attention_mask"] = inputs["input_ids"].new_ones(batch, length + 1)
        with self._lock:
            return self._replay(model, kwargs["past_key_values"], layers, inputs, length)

    def _inputs(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        """The tensors of a step that asks for nothing but logits."""
        if len(args) > 1 or (args and "input_ids" in kwargs):
            return None
        given = {**kwargs, "input_ids": args[0]} if args else kwargs
        ids, config = given.get("input_ids"), model.config
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or ids.device.type not in RECORDERS:
            return None
        if torch.is_autocast_enabled(ids.device.type) or config.output_attentions or config.output_hidden_states:
            return None
        if not all(_is_plain(name, value) for name, value in given.items()):
            return None
        returns_dict = given.get("return_dict")
        if given.get("use_cache") is False or not (config.return_dict if returns_dict is None else returns_dict):
            return None
        inputs = {name: given[name] for name in _INPUTS if given.get(name) is not None}
        for value in inputs.values():
            if not isinstance(value, Tensor) or value.dim() != 2 or value.device != ids.device:
                return None
            if value.is_floating_point():
                return None
        return inputs

    # ---- the step ----

    def _replay(
        self, model: PreTrainedModel, cache: Any, layers: list[KVLayer], inputs: dict[str, Tensor], length: int
    ) -> Any:
        slot = self._slot(layers, length)
        slot.fill(inputs, length)
        recording = slot.recordings.get(tuple(inputs))
        if recording is None:
            recording = self._record(model, slot, tuple(inputs))
            if recording is None:
                return None
            slot.recordings[tuple(inputs)] = recording
        recording.replay()
        # The GPU is at work; meanwhile the host looks whether all is still as it was. If not, the model's own forward
        # does the step again: it writes the same places of the cache.
        assert self._snapshot is not None
        if not self._snapshot.is_current():
            self.forget()
            return None
        for layer in layers:
            layer.advance(1)
        output = recording.output
        return type(output)(logits=output.logits.clone(), past_key_values=cache)

    def _slot(self, layers: list[KVLayer], length: int) -> _Slot:
        """The slot of these layers, with room for one more token."""
        for layer in layers:
            layer.make_room(1)
        for slot in self._slots:
            if slot.belongs_to(layers):
                return slot
        for slot in self._slots:
            if slot.is_free() and slot.fits(layers, length):
                slot.take_in(layers)
                return slot
        # At most one free slot is kept: memory is for those in use.
        self._slots = [slot for slot in self._slots if not slot.is_free()]
        self._slots.append(_Slot(layers))
        return self._slots[-1]

    def _record(self, model: PreTrainedModel, slot: _Slot, names: tuple[str, ...]) -> Recording | None:
        if self._snapshot is None:
            self._snapshot = _Snapshot(model)
        if not self._snapshot.is_current():
            self._snapshot, self._slots = None, []
            return None
        masked = "attention_mask" in names

        def run() -> Any:
            # Views, which are new objects: nothing looked up for the tensors of another run is taken for theirs.
            inputs = {name: slot.inputs[name].view_as(slot.inputs[name]) for name in names}
            return type(model).forward(model, **inputs, past_key_values=slot.cache(masked), use_cache=True)

        try:
            with torch.inference_mode(False), torch.no_grad():  # for calls in any mode to come
                with _Rehearsal():
                    output = run()
                if {name for name, value in output.items() if value is not None} == {"logits", "past_key_values"}:
                    return RECORDERS[slot.device.type](run, slot.device)
        except CannotBeRecorded:
            pass
        except RuntimeError as error:
            warnings.warn(f"a decoding step could not be recorded and runs without a graph: {error}", stacklevel=2)
        # Some families make a mask of their own where none is given, of a size they ask the device for.
        self._impossible = masked
        self._masks_wanted = True
        return None


def _is_plain(name: str, value: Any) -> bool:
    """Whether an argument asks for no more than the logits of a token."""
    if value is None or value is False or name in _INPUTS or name == "past_key_values":
        return True
    if name == "logits_to_keep":
        return type(value) is int and value in (0, 1)
    return name in ("use_cache", "return_dict") and value is True


def _layers(cache: Any) -> list[KVLayer]:
    if type(cache) is not DynamicCache or cache.offloading:
        return []
    layers: list[Any] = cache.layers
    return layers if all(type(layer) is KVLayer for layer in layers) else []
