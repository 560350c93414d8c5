"""A machine with GPUs that are none: tensors that say they are on one of them, hold their values on the CPU, and refuse
to meet tensors of another device. What runs on it gives the numbers it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from autoq.nn.recording import CudaRecording


class _Backend:
    """What torch asks of a kind of device once it is there, and other tests in the same process with it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend("gpu", _Backend())
CPU, FIRST, SECOND = (torch.device(name) for name in ("cpu", "gpu:0", "gpu:1"))


class DeviceMismatch(Exception):
    pass


class _OnGPU(Tensor):
    """`held`: the values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes parameters of the class that it finds
            return torch.nn.Parameter(held, requires_grad)
        found: _OnGPU = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=device
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.held!r} on {self.device}"


def _devices(arguments: Any) -> Iterator[torch.device]:
    for value in tree_iter(arguments):
        # As on a GPU, a number may come from anywhere; and so may what stands for a tensor that is not there.
        if isinstance(value, Tensor) and (isinstance(value, _OnGPU) or (value.ndim > 0 and value.numel() > 0)):
            yield value.device


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("device")
    found = set(_devices((args, kwargs)))
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if len(found) > 1 and not copies:
        raise DeviceMismatch(f"{func} got tensors on {sorted(map(str, found))}")
    place = asked if asked is not None else args[0].device if copies else next(iter(found), CPU)
    if place.type == "gpu":
        place = torch.device("gpu", place.index or 0)
    wrappers: dict[int, Any] = {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, _OnGPU):
            wrappers[id(value.held)] = value
            return value.held
        return CPU if isinstance(value, torch.device) and value.type == "gpu" else value

    def wrap(value: Any) -> Any:
        if isinstance(value, Tensor) and place.type == "gpu":
            return wrappers.get(id(value)) if id(value) in wrappers else _OnGPU(value, place)
        return value

    args, kwargs = tree_map(unwrap, (args, kwargs))
    result = func(*args, **kwargs)
    if func is torch.ops.aten._to_copy.default and any(result is value for value in tree_iter(args)):
        result = result.clone()
    return tree_map(wrap, result)


class _MadeOnCPU(TorchFunctionMode):
    """`torch.tensor`, and an index that is a list, are copied to a device where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            device = args[0].device
            index = (_OnGPU(torch.tensor(part), device) if isinstance(part, list) else part for part in args[1])
            args = (args[0], tuple(index) if device.type == "gpu" else args[1])
        return func(*args, **kwargs)


class Machine(TorchDispatchMode):
    """While open, its devices "gpu:0", "gpu:1", ... can be used.

    moves: the shape of every tensor that was copied to another device, and that device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made_on_cpu = _MadeOnCPU()
        self.moves: list[tuple[tuple[int, ...], torch.device]] = []

    def __enter__(self) -> Machine:
        self._made_on_cpu.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made_on_cpu.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.moves.append((tuple(result.shape), result.device))
        return result


def _is_new(result: Any) -> bool:
    """Whether an operator's result is a tensor with memory of its own."""
    return isinstance(result, Tensor) and not result._is_view()


class Graph(TorchDispatchMode):
    """What a CUDA graph does, on a device of the machine: keeps the operators between `begin` and `end`, and does them
    again, into the same memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.replays = device, 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if set(_devices((args, kwargs, result))) - {self.device}:
            raise DeviceMismatch(f"{func} in a graph of {self.device}")
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        # Capturing does nothing: there are no results before the first replay.
        for _, args, kwargs, result in self._calls:
            given = {id(value) for value in tree_iter((args, kwargs))}
            for tensor in tree_iter(result):
                if _is_new(tensor) and id(tensor) not in given:
                    tensor.fill_(7)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                if _is_new(old) and old is not new:
                    old.copy_(new)

    @staticmethod
    @contextmanager
    def prepared(run: Callable[[], Any], devices: Iterable[torch.device]) -> Iterator[None]:
        run()
        yield


class GraphRecording(CudaRecording):
    """A recording on the devices of the machine."""

    graph_class = Graph
