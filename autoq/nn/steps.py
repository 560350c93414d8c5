"""A decoding step that is recorded once and replayed for every token: a CUDA graph, on the CPU a list of operators.

On a GPU a step of a model with fused blocks is some hundreds of kernels of a few microseconds; started from Python one
by one, they take longer to start than to run. On a CPU what Python does around and between the blocks takes a seventh
of a step of a small model. A recording does all at once, but always with the same tensors and the same numbers. So
whatever changes from token to token is kept in tensors that stay: the token, its position, the mask, and the length of
the cache, which the operator of the blocks and transformers' own code then read from a tensor, as they do with
transformers' static cache.

`RecordedSteps` takes the place of the model's forward. It replays what it can and hands everything else to the model's
own forward, with the same result: prompts, gradients, hooks, other caches, whatever the fused blocks themselves cannot
run.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from autoq.architectures import architecture_of, known_model_types
from autoq.nn.block import FusedForward, is_watched
from autoq.nn.cache import KVBuffers, KVLayer
from autoq.nn.held import Contents, HeldTensors
from autoq.nn.linear import QuantModule
from autoq.nn.recording import CannotBeRecorded, CudaRecording, HostRecording, Recording
from autoq.nn.spread import Move, moved_by
from autoq.nn.stand_in import StandIn

# What the step is given, each in a buffer of its own; whatever else a call asks for is not recorded.
_INPUTS = ("input_ids", "attention_mask", "position_ids")

# How a step is recorded on a type of device; on others it is not.
RECORDERS: dict[str, Any] = {"cuda": CudaRecording, "cpu": HostRecording}


def idle_limit(device: torch.device) -> int:
    """The bytes of keys and values that may wait for the next cache: prompts need memory too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 10
    return psutil.virtual_memory().total // 10


# ---- what stays where it is ------------------------------------------------------------------------------------------


class _StaticLayer(KVLayer):
    """The cache of one block as a recording sees it: full size, with its length on the device."""

    length: Tensor

    def __init__(self, buffers: KVBuffers, length: Tensor, length_of_inputs: Tensor, masked: bool) -> None:
        """length: on the block's device. length_of_inputs: the same on that of the model's inputs, which transformers
        asks for."""
        super().__init__(buffers.key_scales is not None)
        self._buffers, self.length, self._length_of_inputs = buffers, length, length_of_inputs
        self.masked = masked
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
        return self._length_of_inputs

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        assert self._buffers is not None
        return self._buffers.capacity, 0


class _RecordedStep(NamedTuple):
    recording: Recording
    output_class: type[Any]  # of what the model returns


class _Slot:
    """Keys and values of all blocks at fixed addresses, the inputs of a step, and the recordings made of these.

    A slot belongs to the cache whose layers hold its buffers. When that is gone, or has gone over to others, another
    cache can move in, and the recordings are used again.
    """

    def __init__(self, layers: list[KVLayer], device: torch.device) -> None:
        """device: where the inputs are; the blocks, and with them the buffers, may be on others."""
        self.buffers: list[KVBuffers] = [layer.lend() for layer in layers]
        self._owner = weakref.ref(layers[0])
        self.batch, self.capacity, self.device = self.buffers[0].keys.shape[0], self.buffers[0].capacity, device
        self.bytes = sum(tensor.nbytes for buffers in self.buffers for tensor in buffers if tensor is not None)
        with torch.inference_mode(False):
            devices = {device, *(buffers.keys.device for buffers in self.buffers)}
            self.lengths = {each: torch.zeros((), dtype=torch.int64, device=each) for each in devices}
        self.inputs: dict[str, Tensor] = {}
        self.recordings: dict[tuple[str, ...], _RecordedStep] = {}  # by the names of their inputs

    def belongs_to(self, layers: list[KVLayer]) -> bool:
        return len(layers) == len(self.buffers) and all(
            layer.holds(buffers) for layer, buffers in zip(layers, self.buffers, strict=True)
        )

    def is_free(self) -> bool:
        owner = self._owner()
        return owner is None or not owner.holds(self.buffers[0])

    def fits(self, layers: list[KVLayer], length: int) -> bool:
        """Whether these layers could move in with a token more than they hold."""
        return (
            self.capacity > length
            and len(layers) == len(self.buffers)
            and all(layer.fits(buffers) for layer, buffers in zip(layers, self.buffers, strict=True))
        )

    def take_in(self, layers: list[KVLayer]) -> None:
        for layer, buffers in zip(layers, self.buffers, strict=True):
            layer.move_to(buffers)
        self._owner = weakref.ref(layers[0])

    def fill(self, inputs: dict[str, Tensor], length: int) -> None:
        """Puts a step's inputs where the recordings read them."""
        for tensor in self.lengths.values():
            tensor.fill_(length)
        for name, value in inputs.items():
            if name not in self.inputs:
                columns = self.capacity if name == "attention_mask" else 1
                with torch.inference_mode(False):
                    # What is behind the tokens is not padding; that it is yet to come is known from the length.
                    self.inputs[name] = torch.ones(self.batch, columns, dtype=torch.int64, device=self.device)
            self.inputs[name][:, : value.shape[1]].copy_(value)

    def cache(self, masked: bool) -> DynamicCache:
        cache = DynamicCache()
        here = self.lengths[self.device]
        cache.layers = [
            _StaticLayer(buffers, self.lengths[buffers.keys.device], here, masked) for buffers in self.buffers
        ]
        return cache


class _Snapshot:
    """What a recording was made of: the modules, their tensors, and that nobody watches or changes what they do."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())[1:]  # not the model itself, which holds this
        everything = (model, *modules)
        hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._contents = Contents([model.config.__dict__, *(each._modules for each in everything), *hooks])
        self._attributes = Contents([each.__dict__ for each in modules], ["training", "forward", "mode"])
        self._hooked = [each for each in modules if each._forward_hooks or each._forward_pre_hooks]
        quantized = [each for each in modules if isinstance(each, QuantModule)]
        self._held = HeldTensors(
            (tensors for each in everything for tensors in (each._parameters, each._buffers)),
            read_anew=(tensor for each in quantized for tensor in each.packed()),
        )
        # With the memory of each, which a recording uses: it must not be gone before a change is noticed.
        self._memory = [tensor.detach() for tensor in self._held.tensors]
        blocks = list(architecture_of(model.config).decoder_blocks(model))
        forwards = [each.__dict__["forward"] for each in modules if "forward" in each.__dict__]
        fused = [forward for forward in forwards if isinstance(forward, FusedForward)]
        self._memory += [tensor for forward in fused for tensor in forward.tensors]  # merged biases among them
        inside = {module for block in blocks for module in block.modules()}  # which the fused blocks look at
        self._can_be_recorded = (
            len({tensor.device.type for tensor in self._held.tensors}) == 1
            and len(fused) == len(blocks)
            and all(isinstance(forward, StandIn) for forward in forwards)
            and not any(each.training for each in modules)
            and all(_is_known(module) for module in modules if module not in inside)
        )

    def is_current(self) -> bool:
        return (
            self._can_be_recorded
            and not nn.modules.module._has_any_global_hook()
            and not any(map(is_watched, self._hooked))
            and self._attributes.are_current()
            and self._contents.are_current()
            and self._held.are_current()
        )


def _is_known(module: nn.Module) -> bool:
    """Whether what a module does depends on nothing but its tensors: others, such as adapters, have switches."""
    return type(module).__module__.partition(".")[0] in ("torch", "transformers", "autoq")


# ---- the forward -----------------------------------------------------------------------------------------------------


def record_steps(model: PreTrainedModel) -> None:
    """Replaces the forward of a model by one that records its decoding steps, where its blocks run fused."""
    if model.config.model_type in known_model_types() and "forward" not in model.__dict__:
        model.forward = RecordedSteps(model)


class RecordedSteps:
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
        tracing = torch.compiler.is_compiling() or torch._C._is_tracing()
        if torch.is_grad_enabled() or tracing or model.training:
            return type(model).forward(model, *args, **kwargs)
        output = self._step(model, args, kwargs)
        return type(model).forward(model, *args, **kwargs) if output is None else output

    # ---- whether this call is a step ----

    def _step(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for one more token of every sequence, or None where its own forward has to say."""
        inputs = self._inputs(model, args, kwargs)
        if inputs is None:
            self._before_a_prompt()
            return None
        layers = _layers(kwargs.get("past_key_values"))
        if not layers:
            self._before_a_prompt()
            return None
        if self._impossible:
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
            inputs = {name: inputs[name] for name in _INPUTS if name in inputs}
        if not self._lock.acquire(blocking=False):
            return None  # a recording is of one set of tensors: other threads go their own way meanwhile
        try:
            return self._replay(model, kwargs["past_key_values"], layers, inputs, length)
        finally:
            self._lock.release()

    def _before_a_prompt(self) -> None:
        self._impossible = False  # so that it is tried again
        with self._lock:
            self._drop_slots(idle_limit)

    def _drop_slots(self, limit: Callable[[torch.device], int]) -> None:
        """Keeps the slots in use and, if it is no larger than that, the free one that was made last."""
        kept = [slot for slot in self._slots if slot.is_free() and slot.bytes <= limit(slot.device)][-1:]
        self._slots = [slot for slot in self._slots if slot in kept or not slot.is_free()]

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
        if self._snapshot is None:
            snapshot = _Snapshot(model)
            if not snapshot.is_current():
                self._impossible = True
                return None
            self._snapshot = snapshot
        slot = self._slot(layers, length, inputs["input_ids"].device)
        slot.fill(inputs, length)
        step = slot.recordings.get(tuple(inputs))
        if step is None:
            step = self._record(model, slot, tuple(inputs))
            if step is None:
                return None
            slot.recordings[tuple(inputs)] = step
        logits = step.recording.replay()
        # A GPU is at work; meanwhile the host looks whether all is still as it was. If not, the model's own forward
        # does the step again: it writes the same places of the cache.
        if not self._snapshot.is_current():
            self.forget()
            return None
        for layer in layers:
            layer.advance(1)
        return step.output_class(logits=logits, past_key_values=cache)

    def _slot(self, layers: list[KVLayer], length: int, device: torch.device) -> _Slot:
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
        self._drop_slots(lambda _: 0)  # memory is for those in use
        self._slots.append(_Slot(layers, device))
        return self._slots[-1]

    def _record(self, model: PreTrainedModel, slot: _Slot, names: tuple[str, ...]) -> _RecordedStep | None:
        masked = "attention_mask" in names
        output_class: type[Any] = type(None)

        def run(move: Move) -> Tensor:
            nonlocal output_class
            # Views, which are new objects: nothing looked up for the tensors of another run is taken for theirs.
            inputs = {name: slot.inputs[name].view_as(slot.inputs[name]) for name in names}
            with moved_by(move):
                output = type(model).forward(model, **inputs, past_key_values=slot.cache(masked), use_cache=True)
            if {name for name, value in output.items() if value is not None} != {"logits", "past_key_values"}:
                raise CannotBeRecorded("a model that returns more than logits and the cache")
            output_class = type(output)
            logits: Tensor = output.logits
            return logits

        try:
            with torch.inference_mode(False), torch.no_grad():  # for calls in any mode to come
                changing = (*slot.lengths.values(), *slot.inputs.values())
                recording = RECORDERS[slot.device.type](run, slot.device, changing)
                return _RecordedStep(recording, output_class)
        except (CannotBeRecorded, RuntimeError) as error:
            if masked:
                text = f"decoding steps of this model are not recorded, which makes them slower: {error}"
                warnings.warn(f"{text} (docs/runtime.md, Recorded steps)", stacklevel=2)
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
