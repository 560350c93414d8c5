"""What a run will take, before it begins: memory, disk and time; and whether it may."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.architectures.base import named_linears
from autoq.config import LM_HEAD
from autoq.errors import ConfigError
from autoq.nn.spread import is_offloaded
from autoq.ops import has_units
from autoq.placement import megabytes, parts_of
from autoq.quantization import awq, refinement
from autoq.quantization.activations import leaders_of
from autoq.quantization.plan import Plan
from autoq.quantization.search import REPORTED_ROWS
from autoq.quantization.streams import HELD_OUT_BATCH_TOKENS
from autoq.quantization.tuning import STEPS

# Beside what is counted: what libraries allocate for themselves, and what the allocator does not give back.
_UNCOUNTED = 300_000_000
# Copies of a Gram matrix while it is factored, and of a weight while it is rounded, in fp32.
_GRAM_COPIES = 3
_WEIGHT_COPIES = 7
# Copies of all weights of a block while it is tuned: the weight, what is learned and its two moments, gradients, and
# the weight as it is rounded on the way.
_TUNING_COPIES = 9
# Rows that are multiplied with a Gram matrix to find a scale, by half of it: it is symmetric. And for the report.
_SEARCHED_ROWS = (len(awq.SCALE_GRID) + 1) * awq.SCREENED_ROWS + awq.FINALISTS * awq.DECIDING_ROWS
_REPORTED_ROWS = 3 * REPORTED_ROWS
# Factoring a matrix is slower than multiplying matrices, by about this.
_FACTORING = 2
# Beside matrix products: rounding, clipping, reading, writing.
_OTHER_TIME = 1.45


@dataclass(frozen=True)
class Estimate:
    """What a run takes: `memory` of the process at its peak, `disk` bytes, `seconds`.

    hidden: bytes of what flows between the blocks, which is part of `memory` or of `disk`; statistics: of those that
        are kept, part of `disk`.
    """

    memory: int
    disk: int
    seconds: float
    hidden: int
    statistics: int

    def for_share(self, share: float) -> Estimate:
        """For a run that has this share of the blocks left to do."""
        return replace(self, seconds=share * self.seconds)

    def __str__(self) -> str:
        minutes = self.seconds / 60
        spent = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{self.seconds:.0f} seconds"
        disk = f", {megabytes(self.disk)} on the disk" if self.disk else ""
        return f"about {spent}, {megabytes(self.memory)} of memory{disk}"


@dataclass(frozen=True)
class Load:
    """What a process of a run has to do.

    tokens, held_out_tokens: that it sends through the blocks; longest: of one sample.
    processes: that share the search; width: blocks that are observed before the first of them is done.
    device: where blocks are run and searched; None: where they are.
    resident: bytes of memory that the process takes already. statistics: the directory they are written to, if any.
    """

    tokens: int
    held_out_tokens: int = 0
    longest: int = 0
    processes: int = 1
    width: int = 1
    device: torch.device | None = None
    resident: int = 0
    statistics: Path | None = None


def resident_bytes() -> int:
    """The memory this process takes."""
    return int(psutil.Process().memory_info().rss)


def estimate(model: PreTrainedModel, plan: Plan, load: Load, in_memory: bool, keeps_results: bool) -> Estimate:
    """An estimate for a run on this machine.

    in_memory: whether what flows between blocks is kept there. keeps_results: whether blocks are written to the disk.
    """
    tokens, held_out_tokens = load.tokens, load.held_out_tokens
    blocks = plan.architecture.decoder_blocks(model)
    largest = max(blocks, key=_linear_weights)
    itemsize = model.dtype.itemsize
    widths = {leaf: linear.in_features for leaf, linear in named_linears(largest)}
    leaders = {widths[leader] for leader in leaders_of(largest, plan).values()}
    grams = 4 * sum(widths[leader] ** 2 for leader in set(leaders_of(largest, plan).values()))
    weights = [linear.weight.numel() for _, linear in named_linears(largest)]
    hidden_size = int(model.config.hidden_size)
    hidden = (tokens * (2 if plan.tunes else 1) + 2 * held_out_tokens) * hidden_size * itemsize

    offloaded = is_offloaded(blocks)
    block = _bytes(largest) if offloaded else 0
    # In a pass through the block some activations of its widest linear are alive, one of them in fp32.
    batch = min(tokens, max(plan.batch_tokens, load.longest)) * (
        max(leaders) * (4 * itemsize + 4) + 8 * hidden_size * itemsize
    )
    # Of the linears and their Gram matrices fewer and fewer are left; but memory that was freed is not all given back.
    factoring = 4 * _GRAM_COPIES * max(leaders) ** 2
    rounding = 4 * (_WEIGHT_COPIES * max(weights) + 2 * max(leaders) ** 2)
    searching = 4 * sum(weights) + grams + max(factoring, rounding)
    if plan.tunes:
        searching = max(searching, 4 * _TUNING_COPIES * sum(weights) + grams + 4 * batch)
    logits = (
        2
        * min(held_out_tokens, max(HELD_OUT_BATCH_TOKENS, load.longest))
        * int(model.config.vocab_size)
        * (itemsize + 4)
    )
    fetched = 2 * max(part.size for part in parts_of(model) if not part.name.startswith(plan.architecture.blocks))
    head = 0
    if LM_HEAD in plan.specs:
        spec = plan.specs[LM_HEAD]
        size = spec.in_features * spec.out_features
        head = 4 * (_WEIGHT_COPIES * size + (_GRAM_COPIES + 1) * spec.in_features**2)
    if plan.embeddings is not None:
        # The weight, and its codes as they are, in one piece and packed.
        head = max(head, 5 * plan.embeddings.out_features * plan.embeddings.in_features)
    results = sum(
        spec.out_features * (spec.in_features * spec.bits // 8 + 4 * spec.groups) for spec in plan.specs.values()
    )
    for index, some in enumerate(blocks):
        prefix = plan.block_name(index)
        results += sum(part.weight.nbytes for leaf, part in named_linears(some) if f"{prefix}.{leaf}" not in plan.specs)
    # A process that waits for its turn to search keeps its block while it observes those of the others, and a block
    # that is done while it is written.
    observing = grams + batch + (block + grams if load.processes > 1 and load.width > 1 else 0)
    if keeps_results:
        observing += results // len(blocks)
    if not has_units(model.dtype, _device(model, load)):  # a copy in fp32
        observing += 4 * sum(weights)
    peak = max(block + max(observing, searching), head, logits)
    if load.device is not None and load.device.type != "cpu":
        peak = block  # the rest takes the memory of that device
    peak = max(peak, fetched if offloaded else 0)
    memory = load.resident + _UNCOUNTED + peak + (hidden if in_memory else 0)

    # Of all processes, which may share a disk: the inputs of all blocks under way and of the one that is written, and
    # what the last of them gives.
    stages = load.processes * (load.width + 2)
    disk = (results if keeps_results else 0) + (0 if in_memory else stages * hidden)
    statistics = 0
    if load.statistics is not None:
        statistics = grams * len(blocks) + (4 * hidden_size**2 if LM_HEAD in plan.specs else 0)
    return Estimate(memory, disk + statistics, _seconds(model, blocks, plan, load), hidden, statistics)


def _seconds(model: PreTrainedModel, blocks: Iterable[nn.Module], plan: Plan, load: Load) -> float:
    """Counts operations as docs/cost.md does."""
    forward = sums = search = 0.0
    tokens = load.tokens
    refines = plan.config.effort != "fast"
    tries = len(awq.CLIP_GRID) + (refinement.RANGE_TRIES if refines else 0)
    # In columns of the Gram matrix: of compensated rounding, and of a gradient, or two, and the scales of each round.
    columns = 1 + (3 * refinement.ROUNDS - 1 if refines else 0)
    for index, block in enumerate(blocks):
        widths = {leaf: linear.in_features for leaf, linear in named_linears(block)}
        forward += 2 * _linear_weights(block) * (tokens + 2 * load.held_out_tokens)
        for leader in set(leaders_of(block, plan).values()):
            width = widths[leader]
            sums += width**2 * tokens
            search += _SEARCHED_ROWS * width**2 + _FACTORING * width**3 / 3
        for leaf, width in widths.items():
            spec = plan.specs.get(f"{plan.block_name(index)}.{leaf}")
            if spec is not None:
                search += spec.out_features * width * (columns * width + 2 * tries * spec.group_size)
                search += _REPORTED_ROWS * width**2
    if plan.tunes:  # three passes in fp32 for each step, and those between quantized blocks
        weights = sum(_linear_weights(block) for block in blocks)
        sums += weights * (6 * STEPS * min(tokens, plan.batch_tokens) + 2 * tokens)
    else:
        search /= load.processes
    single, own = (_rate(dtype, _device(model, load)) for dtype in (torch.float32, model.dtype))
    return _OTHER_TIME * (forward / own + (sums + search) / single)


def _device(model: PreTrainedModel, load: Load) -> torch.device:
    """Where blocks are run."""
    device = load.device or model.device
    return torch.device("cpu") if device.type == "meta" else device


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a linear, measured in some milliseconds."""
    size = 1024
    dtype = dtype if has_units(dtype, device) else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix.T)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _linear_weights(block: nn.Module) -> int:
    return sum(linear.weight.numel() for _, linear in named_linears(block))


def _bytes(module: nn.Module) -> int:
    tensors: Iterable[Tensor] = chain(module.parameters(), module.buffers())
    return sum(tensor.nbytes for tensor in tensors)


def settle_memory(
    model: PreTrainedModel, plan: Plan, load: Load, *, max_memory: int | None, work_dir: Path | None
) -> tuple[bool, Estimate]:
    """Whether what flows between blocks has to go to the disk, and what the run will take.

    max_memory: the bytes this process may take at most; None: what is free, beyond which there is only a warning.
    Raises ConfigError, with the numbers, when the run does not fit into that memory or onto the disk.
    """
    offloaded = is_offloaded(plan.architecture.decoder_blocks(model))
    on_disk = work_dir is not None
    free = load.resident + psutil.virtual_memory().available // load.processes
    limit = free if max_memory is None else max_memory
    found = estimate(model, plan, load, not on_disk, on_disk or offloaded)
    spills = not on_disk and found.memory > limit
    if spills:
        found = estimate(model, plan, load, False, True)
    if found.memory > limit:
        takes = (
            f"quantizing this model takes {megabytes(found.memory)} of memory even with everything on the disk that "
            "can be there"
        )
        loaded = (
            ""
            if offloaded
            else ' The weights are in memory: from_pretrained(..., device_map="disk") leaves them in their files.'
        )
        if max_memory is not None:
            raise ConfigError(
                f"{takes}, but max_memory allows {megabytes(max_memory)}; raise it, or quantize on a larger machine."
                f"{loaded}"
            )
        warnings.warn(f"{takes}, but {megabytes(limit)} are free.{loaded}", stacklevel=4)
    directory = Path(tempfile.gettempdir()) if work_dir is None else work_dir
    needs = [_Need("work_dir", directory, found.disk - found.statistics, on_disk)]
    if load.statistics is not None:
        needs.append(_Need("statistics", load.statistics, found.statistics, True))
    _check_room(needs)
    return spills, found


class _Need(NamedTuple):
    """Bytes that an argument's directory has to hold; where it is ours, what is there already counts."""

    argument: str
    directory: Path
    needed: int
    is_ours: bool

    @property
    def missing(self) -> int:
        kept = (path.stat().st_size for path in self.directory.rglob("*") if path.is_file()) if self.is_ours else ()
        return max(self.needed - sum(kept), 0)

    @property
    def existing(self) -> Path:
        """The directory, or the one that it will be made in."""
        return next(place for place in (self.directory, *self.directory.absolute().parents) if place.exists())


def _file_system(directory: Path) -> int:
    return directory.stat().st_dev


def _check_room(needs: Iterable[_Need]) -> None:
    """Raises ConfigError unless every file system has room for all that goes there."""
    by_system: dict[int, list[tuple[int, _Need]]] = {}
    for need in needs:
        by_system.setdefault(_file_system(need.existing), []).append((need.missing, need))
    for together in by_system.values():
        missing, free = sum(size for size, _ in together), shutil.disk_usage(together[0][1].existing).free
        if missing > free:
            _, largest = max(together, key=lambda entry: entry[0])
            raise ConfigError(
                f"quantizing this model takes {megabytes(missing)} on the disk, but {largest.directory} has "
                f"{megabytes(free)} left; give a {largest.argument} where there is more"
            )
