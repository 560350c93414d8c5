"""What flows between the blocks of a model while it is quantized, and what linears read of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from autoq.architectures.base import named_linears
from autoq.checkpoint import writing
from autoq.errors import CheckpointError, QuantizationError
from autoq.nn import QuantModule
from autoq.nn.spread import home_of
from autoq.ops import has_units
from autoq.quantization.plan import Plan
from autoq.quantization.statistics import InputStatistics

# What a write that fails leaves.
KEPT = "What a run with a work_dir had done before is kept"


class HiddenStates:
    """The inputs of one block, `[samples, tokens, hidden]` for each batch: in memory, or in files.

    stage: the number of the block whose inputs they are.

    In files, the inputs of earlier blocks stay until `forget` is called, so that a run that is stopped before a block
    is done can send them through that block again.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        """folder: where the files are; None: in memory. writes: False if it is another process that writes them."""
        self.stage = 0
        self._folder, self._writes = folder, writes
        self._batches: dict[int, Tensor] = {}

    def resume(self, limit: int) -> None:
        """Goes on with the inputs of the latest block, up to the one numbered `limit`, that files are there for."""
        self.stage = max((stage for stage in self._stages() if stage <= limit), default=0)

    def read(self, batch: int) -> Tensor:
        if self._folder is None:
            return self._batches[batch]
        path = self._folder / f"{self.stage:05d}" / f"{batch:05d}.safetensors"
        try:
            return load_file(path)["hidden_states"]
        except (OSError, KeyError, SafetensorError) as error:
            remedy = f"delete {self._folder} to have them computed again"
            if not self._writes:
                remedy = "another process wrote them: work_dir must be one directory that all processes reach"
            raise CheckpointError(
                f"{path}, hidden states between two blocks, cannot be read ({error}); {remedy}"
            ) from None

    def write(self, batch: int, states: Tensor) -> None:
        """What the block made of a batch; becomes the batch with `advance`, in memory at once."""
        if self._folder is None:
            self._batches[batch] = states
            return
        with writing(self._folder, KEPT):
            self._partial.mkdir(parents=True, exist_ok=True)
            save_file({"hidden_states": states.to("cpu").contiguous()}, self._partial / f"{batch:05d}.safetensors")

    def advance(self, by: int = 1) -> None:
        """What was written is the input of the next block (`by=0`: of this one)."""
        self.stage += by
        if self._folder is not None:
            done = self._folder / f"{self.stage:05d}"
            shutil.rmtree(done, ignore_errors=True)
            with writing(done, KEPT):
                os.replace(self._partial, done)

    def forget(self, limit: int) -> None:
        """Deletes the inputs of the blocks before the one numbered `limit`."""
        for stage in self._stages():
            if stage < min(limit, self.stage) and self._folder is not None:
                shutil.rmtree(self._folder / f"{stage:05d}", ignore_errors=True)

    @property
    def _partial(self) -> Path:
        assert self._folder is not None
        return self._folder / "partial"

    def _stages(self) -> list[int]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]


class Activations:
    """Samples on their way through the blocks of a model.

    batches: token ids, int64 `[samples, tokens]` each; states: what the next block gets of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        samples: Sequence[Tensor],
        folder: Path | None = None,
        resume_at: int = 0,
        batch_tokens: int | None = None,
        writes: bool = True,
    ) -> None:
        """Runs the model as far as its first block.

        folder: where hidden states are kept; None: in memory. resume_at: the block at which a stopped run goes on.
        batch_tokens: how many go through a block together; None: the plan's.
        writes: False if it is another process that sends them through the blocks and writes the folder.
        """
        self.batches = list(_batches(samples, batch_tokens or plan.batch_tokens))
        self.states = HiddenStates(folder, writes)
        self.states.resume(resume_at)
        self._kinds = _block_kinds(model, len(plan.architecture.decoder_blocks(model)))
        self._keywords: list[dict[str, dict[str, Any]]] = []
        begins = writes and self.states.stage == 0
        for number, batch in enumerate(self.batches):
            hidden = self._record(model, plan, batch)
            if begins:
                self.states.write(number, hidden)
        if begins and self.batches:
            self.states.advance(by=0)

    def _record(self, model: PreTrainedModel, plan: Plan, batch: Tensor) -> Tensor:
        """The first block's input, after noting what each kind of block gets beside it."""
        found: list[Tensor] = []
        keywords: dict[str, dict[str, Any]] = {}

        def note(index: int, hidden: Tensor, others: dict[str, Any]) -> Tensor:
            found.append(hidden)
            keywords.setdefault(self._kinds[index], others)
            if len(keywords) == len(set(self._kinds)):
                raise _EnoughSeen
            return hidden

        with blocks_answer(model, plan, note), suppress(_EnoughSeen):
            model(input_ids=batch.to(device_of(model.get_input_embeddings())), use_cache=False)
        # Most batches are of one shape and get the same masks and positions: they are kept once.
        self._keywords.append(_shared(keywords, self._keywords[-1]) if self._keywords else keywords)
        return found[0]

    def is_at(self, index: int) -> bool:
        """Whether there is something that goes through this block next."""
        return bool(self.batches) and self.states.stage == index

    def advance(self, block: nn.Module, home: torch.device | None = None) -> None:
        """Sends the batches through the next block; what it makes of them is kept on the device `home`, if given."""
        device, forward = device_of(block), _forward_of(block)
        for number in range(len(self.batches)):
            given = self.states.read(number).to(device)
            output = forward(given, **self.keywords(number, device))
            hidden = output[0] if isinstance(output, tuple) else output
            self.states.write(number, hidden.to(home or device, given.dtype))
        if self.batches:
            self.states.advance()

    def keywords(self, batch: int, device: torch.device) -> dict[str, Any]:
        """What the next block gets beside the hidden states of a batch."""
        given = self._keywords[batch][self._kinds[self.states.stage]]
        moved: dict[str, Any] = map_tensors(given, lambda tensor: tensor.to(device))
        return moved


class _EnoughSeen(Exception):
    """Ends a forward pass that was started only for what reaches some part of the model."""


def _block_kinds(model: PreTrainedModel, count: int) -> list[str]:
    """What tells blocks apart by their arguments: full and sliding attention have masks of their own."""
    kinds = getattr(model.config, "layer_types", None)
    return list(kinds) if kinds is not None and len(kinds) == count else ["all"] * count


def _batches(samples: Sequence[Tensor], batch_tokens: int) -> Iterator[Tensor]:
    """Stacks samples of one length, `[samples, tokens]`: no padding, so every token counts and none is invented."""
    by_length: dict[int, list[Tensor]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    for length, same in by_length.items():
        count = max(1, batch_tokens // length)
        for first in range(0, len(same), count):
            yield torch.stack(same[first : first + count])


@contextmanager
def blocks_answer(
    model: PreTrainedModel, plan: Plan, answer: Callable[[int, Tensor, dict[str, Any]], Tensor]
) -> Iterator[None]:
    """While open, the blocks of the model compute nothing, but give `answer(number, hidden states, keywords)`."""
    blocks = plan.architecture.decoder_blocks(model)
    in_tuple = plan.architecture.block(plan.model_config).returns_tuple

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **keywords: Any) -> Any:
            hidden = args[0] if args else keywords.pop("hidden_states")
            output = answer(index, hidden, keywords)
            return (output, None) if in_tuple else output

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # of the instance: accelerate's, say
    for index, block in enumerate(blocks):
        block.forward = forward_of(index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def after_blocks(model: PreTrainedModel, plan: Plan, hidden: Tensor, batch: Tensor) -> Tensor:
    """The model's logits for a batch whose hidden states behind the last block are these."""
    device = device_of(model.get_input_embeddings())
    with blocks_answer(model, plan, lambda _index, given, _keywords: hidden.to(given.device)):
        logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return logits


def _shared(value: Any, earlier: Any) -> Any:
    """The value, but tensors that equal the earlier value's are those."""
    if isinstance(value, Tensor) and isinstance(earlier, Tensor):
        same = value.shape == earlier.shape and value.dtype == earlier.dtype and value.device == earlier.device
        return earlier if same and torch.equal(value, earlier) else value
    if isinstance(value, tuple) and isinstance(earlier, tuple) and len(value) == len(earlier):
        return tuple(_shared(one, other) for one, other in zip(value, earlier, strict=True))
    if isinstance(value, dict) and isinstance(earlier, dict):
        return {name: _shared(entry, earlier.get(name)) for name, entry in value.items()}
    return value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """An argument of a block with a function applied to its tensors (some families pass tuples of them)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(entry, function) for entry in value)
    if isinstance(value, dict):
        return {name: map_tensors(entry, function) for name, entry in value.items()}
    return value


def to_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, if it is of floating point."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _forward_of(block: nn.Module) -> Callable[..., Any]:
    """Runs a block, with a copy of its weights in fp32 where the processor has no units for their dtype."""
    if all(has_units(linear.weight.dtype, linear.weight.device) for _, linear in named_linears(block)):
        return block
    quantized = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, QuantModule))
    tensors = chain(block.named_parameters(), block.named_buffers())
    precise = {name: to_fp32(tensor) for name, tensor in tensors if not name.startswith(quantized)}

    def forward(*args: Any, **keywords: Any) -> Any:
        return functional_call(block, precise, map_tensors(args, to_fp32), map_tensors(keywords, to_fp32))

    return forward


def device_of(module: nn.Module) -> torch.device:
    """The device a module runs on."""
    device, _ = home_of(module)
    assert device is not None, "a module without tensors"
    return device


@contextmanager
def _input_hooks(block: nn.Module, leaders: Iterable[str], statistics: dict[str, InputStatistics]) -> Iterator[None]:
    """While open, adds the inputs of the linears named in `leaders` to their statistics."""

    def adder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            statistics[name].add(args[0])

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(adder(name)) for name in leaders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaders_of(block: nn.Module, plan: Plan) -> dict[str, str]:
    """The linears of a block, each with the one that is observed for it: those of a scale group read one activation."""
    leader_of = {leaf: leaf for leaf, _ in named_linears(block)}
    for group in plan.architecture.groups(plan.model_config, scale_activations=True):
        leader_of.update(dict.fromkeys(group.linears, group.linears[0]))
    return leader_of


def observe(
    block: nn.Module,
    activations: Activations,
    plan: Plan,
    alone: bool = False,
    home: torch.device | None = None,
) -> dict[str, InputStatistics]:
    """Sends the activations through the block; returns the statistics of its linears' inputs, by leader.

    alone: nothing else is computed in this process meanwhile. home: as of `Activations.advance`.
    """
    device = device_of(block)
    widths = {leaf: linear.in_features for leaf, linear in named_linears(block)}
    leaders = dict.fromkeys(leaders_of(block, plan).values())
    statistics = {leader: InputStatistics(widths[leader], device, alone) for leader in leaders}
    with _input_hooks(block, statistics, statistics):
        activations.advance(block, home)
    return statistics


def check_statistics(statistics: dict[str, InputStatistics], prefix: str = "") -> None:
    """Completes statistics; raises QuantizationError for inputs that were never seen, or that are not finite.

    prefix: of the linears' full names, with its point.
    """
    for name, entry in statistics.items():
        if not entry.tokens:
            raise QuantizationError(f"no calibration token reached {prefix}{name}; it cannot be quantized")
        if not entry.finish().is_finite():
            raise QuantizationError(
                f"the inputs of {prefix}{name} hold NaN or infinity during calibration; load the model in bfloat16 "
                "or float32 (torch_dtype=...), or check its weights"
            )


def observe_head(
    model: PreTrainedModel, head: nn.Linear, activations: Activations, plan: Plan, device: torch.device
) -> InputStatistics:
    """The statistics of what the head reads, once the activations are through all blocks; kept on a device."""
    statistics = InputStatistics(head.in_features, device)

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        statistics.add(args[0])
        raise _EnoughSeen

    hook = head.register_forward_pre_hook(look)
    try:
        for number, batch in enumerate(activations.batches):
            with suppress(_EnoughSeen):
                after_blocks(model, plan, activations.states.read(number), batch)
    finally:
        hook.remove()
    return statistics
