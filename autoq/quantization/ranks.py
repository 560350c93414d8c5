"""The processes that share a run, started by `torchrun` on one machine or many.

Each has its own copy of the model, or reads it from the disk, and a part of the samples. Statistics are added up where
a block is searched; what became of the block goes to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autoq.errors import CalibrationError, QuantizationError
from autoq.quantization.statistics import InputStatistics

T = TypeVar("T")


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

    def share(self, samples: Sequence[Tensor]) -> Sequence[Tensor]:
        """This process's part of the samples."""
        if len(samples) < self.size:
            raise CalibrationError(
                f"there are {len(samples)} samples for {self.size} processes; give each at least one, or start fewer"
            )
        return samples[self.rank :: self.size]

    def gather(self, statistics: dict[str, InputStatistics], owner: int) -> None:
        """Adds up the statistics of all processes at the one that owns them; the others' are spent."""
        if self.size == 1:
            return
        for entry in statistics.values():
            tokens = torch.tensor(entry.tokens, dtype=torch.int64, device=entry.gram.device)
            for tensor in (entry.gram, entry.absolute, tokens):
                dist.reduce(tensor, owner)
            entry.tokens = int(tokens)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return [float(value) for value in total]

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
            carried = tensor.to(_device())
            # As bytes: not every backend knows every dtype.
            flat = carried.flatten().view(torch.uint8) if carried.numel() else carried
            if flat.numel():
                dist.broadcast(flat, owner)
            received[name] = flat.view(dtype).reshape(shape).to(device) if carried.numel() else tensor.to(device)
        return received

    def agree(self, error: Exception | None, owner: int) -> None:
        """Raises in all processes the error that one of them has met, so that none waits for it."""
        if self.size > 1:
            message = self.tell(None if error is None else str(error), owner)
            if message is not None and error is None:
                raise QuantizationError(message)
        if error is not None:
            raise error


def _device() -> torch.device:
    """Where the backend takes tensors from."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join_torchrun() -> None:
    """Joins the processes that `torchrun` started, unless somebody has: over NCCL with a GPU each, else gloo."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    local = dist.get_node_local_rank()
    gpus = torch.cuda.device_count()
    if gpus > local:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus > local else "gloo")
