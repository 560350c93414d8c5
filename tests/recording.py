"""A stand-in for CUDA graphs on the CPU: what a function does to tensors is written down and done again.

As of a graph, nothing of the function's Python is left: numbers it took from the host are those of the recording, and
the tensors are those it used then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        # Results in memory of their own have to be filled again; views, and what is written in place, are there.
        fresh = [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in storages]
        self.calls.append((func, args, kwargs, fresh))
        return result


class Recorded:
    """Like autoq.nn.graph.CudaRecording."""

    count = 0  # of recordings made
    replays = 0  # of all of them

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        with _Tape() as tape:
            self.output = run()
        self._calls = tape.calls
        Recorded.count += 1
        # A recording does not run.
        for *_, fresh in self._calls:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        Recorded.replays += 1
        for func, args, kwargs, fresh in self._calls:
            result = func(*args, **kwargs)
            if fresh:
                for old, new in zip(fresh, _tensors(result), strict=True):
                    old.copy_(new)
