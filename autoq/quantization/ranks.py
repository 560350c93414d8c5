"""The processes that share a run, started by `torchrun` on one machine or many.

Each has its own copy of the model, or reads it from the disk, and a part of the samples. Statistics are added up where
a block is searched; what became of the block goes to all.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autoq import errors
from autoq.errors import AutoQError, CalibrationError, QuantizationError
from autoq.quantization.statistics import InputStatistics

T = TypeVar("T")

# While one process tunes a block or searches the head, the others wait for it; torch's half hour is too short for that.
_PATIENCE = timedelta(days=7)


class Ranks:
    """This process among those of the run; alone unless `torch.distributed` is initialized.

    rank: its number, `size`: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, samples: Sequence[Tensor], what: str = "calibration", rank: int | None = None) -> Sequence[Tensor]:
        """A process's part of the samples, this one's by default."""
        if len(samples) < self.size:
            raise CalibrationError(
                f"{self.size} processes share the {what} samples, but there are {len(samples)}; give at least one for "
                "each, or start fewer processes"
            )
        return samples[self.rank if rank is None else rank :: self.size]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, statistics: Mapping[str, InputStatistics], owner: int) -> None:
        """Adds up the statistics of all processes at the one that owns them; the others' are spent."""
        if self.size == 1:
            return
        for entry in statistics.values():
            tokens = torch.tensor(entry.tokens, dtype=torch.int64)
            for tensor in (entry.gram, entry.absolute, tokens):
                dist.reduce(tensor, owner)
            entry.tokens = int(tokens)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def largest(self, value: float) -> float:
        """The largest of the numbers that all processes give."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def tell(self, value: T, owner: int = 0) -> T:
        """What one process has, for all; a value that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, owner)
        return box[0]

    def send(self, tensors: dict[str, Tensor], owner: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors that one process has, for all, on a device."""
        if self.size == 1:
            return {name: tensor.to(device) for name, tensor in tensors.items()}
        specs = self.tell([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()], owner)
        received = {}
        for name, shape, dtype in specs:
            tensor = tensors[name].contiguous() if self.rank == owner else torch.empty(shape, dtype=dtype)
            if tensor.numel():
                # As bytes: not every backend knows every dtype.
                flat = tensor.to("cpu").flatten().view(torch.uint8)
                dist.broadcast(flat, owner)
                tensor = flat.view(dtype).reshape(shape)
            received[name] = tensor.to(device)
        return received

    def alone(self, work: Callable[[], T], owner: int = 0) -> T:
        """What one process works out, for all; so is an error that it meets."""
        error: Exception | None = None
        result: Any = None
        if self.rank == owner:
            try:
                result = work()
            except Exception as raised:  # whatever it is, the other processes wait to hear of it
                error = raised
        self.agree(error, owner)
        found: T = self.tell(result, owner)
        return found

    def agree(self, error: Exception | None, owner: int) -> None:
        """Raises in all processes the error that one of them has met, so that none waits for the others."""
        if self.size > 1:
            met = self.tell(None if error is None else (type(error).__name__, str(error)), owner)
            if met is not None and error is None:
                kind, message = met
                ours = getattr(errors, kind, None)
                if isinstance(ours, type) and issubclass(ours, AutoQError):
                    raise ours(message)
                raise QuantizationError(f"process {owner} met a {kind}: {message}")
        if error is not None:
            raise error


def join_torchrun() -> None:
    """Joins the processes that `torchrun` started, unless somebody has: gloo, and NCCL for GPUs if each has one."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    # The same choice in every process: some may have a GPU where others have none.
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    atexit.register(_leave)  # threads that still run at the end of the process would abort it


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
