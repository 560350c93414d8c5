"""A function that is run once and then replayed for every token: CUDA graphs on GPUs, a list of operators on the CPU.

Neither keeps anything of the function's Python. Numbers that it took from the host are those of the recording; what
changes from replay to replay is read from tensors, which stay where they are. A function that runs on several devices
says when it goes from one to the next, by the `Move` (autoq/nn/spread.py) that it is given.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoq.block_ops import SHARED_ARGUMENTS, KeptBlocks, decoder_blocks
from autoq.nn.spread import Move, copy_to_device


class CannotBeRecorded(Exception):
    """A function waits for the device, or brings values from the host to it, which a recording cannot do again."""


Run = Callable[[Move], Tensor]


class Recording(Protocol):
    def replay(self) -> Tensor:
        """Does again what the function did, with what its inputs hold now; returns what it would, in memory that no
        other replay fills."""


class _Call(NamedTuple):
    """Of an operator."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def given(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return _tensors((self.args, self.kwargs))

    def written(self) -> list[Tensor]:
        """What it was given and writes to."""
        schema = self.function._schema.arguments
        given = dict(zip((argument.name for argument in schema), self.args, strict=False)) | self.kwargs
        return [
            tensor
            for argument in schema
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(given.get(argument.name))
        ]


class _Rehearsal(TorchDispatchMode):
    """Runs a function and keeps the operators that it calls; raises CannotBeRecorded at one that a recording could not
    hold."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.devices = {device}
        self._device, self._moving = device, False

    def move(self, tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        self.devices.add(device)
        self._device, self._moving = device, True
        moved = [tensor.to(device) for tensor in tensors]
        self._moving = False
        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or _size_depends_on_values(func, args):
            raise CannotBeRecorded(f"{name} looks at the values of a tensor")
        result = func(*args, **kwargs)
        copies = name in ("aten::_to_copy", "aten::copy_")
        source = args[1] if name == "aten::copy_" else args[0] if copies else None
        if copies and isinstance(source, Tensor) and source.device != result.device and not self._moving:
            raise CannotBeRecorded(f"{name} from {source.device} to {result.device}")
        for tensor in _tensors(result):
            # The host may do something of its own beside a GPU, but not another GPU.
            if tensor.device.type == self._device.type and tensor.device != self._device:
                raise CannotBeRecorded(f"{name} on {tensor.device} while the others are on {self._device}")
        if name == "aten::lift_fresh" and result.is_cuda:
            raise CannotBeRecorded("a tensor made of numbers of the host")
        self.calls.append(_Call(func, args, kwargs, result))
        return result


class _NoWayAround(TorchFunctionMode):
    """Raises CannotBeRecorded where a function takes the values of a tensor, or its memory, past the operators."""

    _WAYS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._WAYS:
            raise CannotBeRecorded(f"{func.__name__} of a tensor")
        return func(*args, **(kwargs or {}))


_one_at_a_time = threading.Lock()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """While open, nothing is dropped but by its last reference, in one thread at a time: collecting another graph's
    remains would break a capture."""
    with _one_at_a_time:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


class _CudaGraph:
    """What one GPU does between two points of a program. Nothing may wait for it there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def begin(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.capture_begin(capture_error_mode="thread_local")

    def end(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    @contextmanager
    def prepared(run: Callable[[], Any], devices: Iterable[torch.device]) -> Iterator[None]:
        """While open, graphs can be made of what `run` does on these devices: on streams of their own."""
        streams = [(torch.cuda.current_stream(device), torch.cuda.Stream(device)) for device in devices]
        with ExitStack() as stack:
            stack.enter_context(without_garbage_collection())
            for current, stream in streams:
                stream.wait_stream(current)
                stack.enter_context(torch.cuda.stream(stream))
            run()  # libraries set themselves up at the first call
            for _, stream in streams:
                stream.synchronize()
            torch.cuda.empty_cache()  # a graph has memory of its own, and cannot take what is kept for others
            yield
        for current, stream in streams:
            current.wait_stream(stream)


class _Stretch(NamedTuple):
    """What a function does on one device, and the copies that take it to the next."""

    graph: Any
    copies: list[tuple[Tensor, Tensor]]  # sources and targets


class CudaRecording:
    """CUDA graphs, each of one device, and the copies between them."""

    graph_class: Any = _CudaGraph

    def __init__(self, run: Run, device: torch.device, inputs: Iterable[Tensor]) -> None:
        """run: the function. device: where it begins. inputs: the tensors whose values differ from replay to replay."""
        rehearsal = _Rehearsal(device)
        with rehearsal, _NoWayAround():  # before a recording breaks
            run(rehearsal.move)
        self._stretches: list[_Stretch] = []
        with self.graph_class.prepared(lambda: run(copy_to_device), rehearsal.devices):
            self._begin(device)
            try:
                self._output = run(self._move)
            finally:
                self._stretches[-1].graph.end()

    def replay(self) -> Tensor:
        for graph, copies in self._stretches:
            graph.replay()
            for source, target in copies:
                target.copy_(source, non_blocking=True)
        return self._output.clone()

    def _begin(self, device: torch.device) -> None:
        self._device = device
        self._stretches.append(_Stretch(self.graph_class(device), []))
        self._stretches[-1].graph.begin()

    def _move(self, tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        if not tensors and device == self._device:
            return []
        stretch = self._stretches[-1]
        stretch.graph.end()
        targets = [torch.zeros_like(tensor, device=device) for tensor in tensors]
        stretch.copies.extend(zip(tensors, targets, strict=True))
        self._begin(device)
        return targets


class _Step(NamedTuple):
    """A call that is made again."""

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    moved: list[tuple[Any, Any, int]]  # containers of arguments, and which result belongs where in them
    kept: int | None  # where the result goes, if it is a new tensor
    kept_each: list[int | None]  # the same of several results


class HostRecording:
    """The operators that a function calls, one after the other without what is around them.

    Those that give the same every time, since nothing they are given changes, are left out: their results are kept.
    Decoder blocks that follow each other are one call, and kept from one replay to the next.
    """

    def __init__(self, run: Run, device: torch.device, inputs: Iterable[Tensor]) -> None:
        """As of CudaRecording."""
        with _Rehearsal(device) as rehearsal, _NoWayAround():
            output = run(rehearsal.move)
        self._places: dict[int, int] = {}  # of results by their identity
        self._steps = [self._step(call) for call in _with_blocks_joined(_changing(rehearsal.calls, inputs))]
        self._results: list[Any] = [None] * len(self._places)
        if id(output) not in self._places:
            raise CannotBeRecorded("a result that came past the operators, or never changes")
        self._output = self._places[id(output)]

    def replay(self) -> Tensor:
        results = self._results
        for function, args, kwargs, moved, kept, kept_each in self._steps:
            for container, key, place in moved:
                container[key] = results[place]
            result = function(*args, **kwargs)
            if kept is not None:
                results[kept] = result
            for each, tensor in zip(kept_each, result, strict=True) if kept_each else ():
                if each is not None:
                    results[each] = tensor
        output: Tensor = results[self._output]
        return output

    def _step(self, call: _Call) -> _Step:
        moved: list[tuple[Any, Any, int]] = []
        if call.function is decoder_blocks and KeptBlocks.can_be_made(call.args):
            call = call._replace(function=KeptBlocks(*call.args), args=KeptBlocks.changing(call.args))
        args, kwargs = self._arguments(list(call.args), moved), self._arguments(call.kwargs, moved)
        several = isinstance(call.result, (list, tuple))
        kept = None if several else self._keep(call.result)
        return _Step(
            call.function, args, kwargs, moved, kept, [self._keep(each) for each in call.result] if several else []
        )

    def _arguments(self, given: Any, moved: list[tuple[Any, Any, int]]) -> Any:
        """A copy of arguments, to be changed."""
        if not isinstance(given, (list, tuple, dict)):
            return given
        copy: Any = dict(given) if isinstance(given, dict) else list(given)
        for key, value in given.items() if isinstance(given, dict) else enumerate(given):
            copy[key] = self._arguments(value, moved)
            if isinstance(value, Tensor) and id(value) in self._places:
                moved.append((copy, key, self._places[id(value)]))
        return copy

    def _keep(self, result: Any) -> int | None:
        if not isinstance(result, Tensor) or id(result) in self._places:
            return None
        return self._places.setdefault(id(result), len(self._places))


def _size_depends_on_values(function: Any, args: tuple[Any, ...]) -> bool:
    if function is torch.ops.aten.index.Tensor:
        return any(places is not None and places.dtype in (torch.bool, torch.uint8) for places in args[1])
    return torch.Tag.dynamic_output_shape in function.tags


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common, as long as they live."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _changing(calls: list[_Call], inputs: Iterable[Tensor]) -> list[_Call]:
    """Those whose results may differ from one time to the next."""
    memory = {_memory(tensor) for tensor in inputs} | {_memory(tensor) for call in calls for tensor in call.written()}
    kept = []
    for call in calls:
        touched = {_memory(tensor) for tensor in (*call.given(), *_tensors(call.result))}
        if touched & memory or torch.Tag.nondeterministic_seeded in call.function.tags:
            memory |= touched & {_memory(tensor) for tensor in _tensors(call.result)}
            kept.append(call)
    return kept


def _with_blocks_joined(calls: list[_Call]) -> list[_Call]:
    uses = Counter(id(tensor) for call in calls for tensor in call.given())
    joined: list[_Call] = []
    for call in calls:
        last = joined[-1] if joined else None
        if last is not None and _follows(call, last) and uses[id(last.result)] == 1:
            args = tuple(
                last.args[i] if i in SHARED_ARGUMENTS else [*last.args[i], *given] for i, given in enumerate(call.args)
            )
            joined[-1] = _Call(decoder_blocks, args, call.kwargs, call.result)
        else:
            joined.append(call)
    return joined


def _follows(call: _Call, last: _Call) -> bool:
    """Whether both are of blocks, and one goes on from the result of the other with all that blocks share."""
    if not call.function is last.function is decoder_blocks or len(call.args) != len(last.args):
        return False
    hidden, *_ = call.args
    shared = [(call.args[i], last.args[i]) for i in SHARED_ARGUMENTS[1:] if i < len(call.args)]
    return hidden is last.result and all(
        ours is theirs or (type(ours) is int and ours == theirs) for ours, theirs in shared
    )
