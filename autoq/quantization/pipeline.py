"""Quantizes a model block by block: observe the inputs, search, fold, round, replace, free."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from autoq.architectures import Architecture, ScaleGroup, architecture_of
from autoq.architectures.base import named_linears
from autoq.config import LM_HEAD, QuantConfig
from autoq.errors import QuantizationError
from autoq.formats import LinearSpec, get_format
from autoq.nn import QuantLinear, ScaledActivation
from autoq.nn.linear import replace_module
from autoq.quantization import awq, refinement, tuning
from autoq.quantization.calibration import CalibrationSet
from autoq.quantization.compensation import Compensator
from autoq.quantization.report import LinearReport, QuantizationReport
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.weight import QuantizedWeight, dequantize, fake_quantize, quantize

# Samples of one length go through a block together, up to this many tokens.
_BATCH_TOKENS = 4096
# As many for a step of the tuning.
_TUNING_TOKENS = 512


def quantize_model(
    model: PreTrainedModel,
    config: QuantConfig,
    calibration: CalibrationSet,
    progress: bool = True,
    devices: Sequence[torch.device] = (),
) -> tuple[QuantConfig, QuantizationReport]:
    """Quantizes every linear of the decoder blocks, in place.

    model: a transformers causal LM in evaluation mode with its weights in memory.
    calibration: the token samples whose activations guide the search.
    devices: where blocks are run and searched, in turns; each goes back to where it was. Empty: where it is.
    Returns the config with what the run settled (linears left alone, other group sizes), and the report.

    Raises ArchitectureError for an unknown family or block, QuantizationError when a weight or an activation is not
    finite (the layer is named) or nothing can be quantized. On an error, blocks done before it stay quantized.
    """
    start = time.perf_counter()
    plan = _Plan.of(model, config)
    blocks = plan.architecture.decoder_blocks(model)
    report = QuantizationReport(calibration.describe(), calibration.tokens)
    with torch.no_grad():
        activations = _block_inputs(model, blocks, calibration.samples, plan.batch_tokens)
        report.linears += _quantize_blocks(blocks, activations, plan, devices, progress)
        if LM_HEAD in plan.group_sizes:
            device = devices[0] if devices else None
            report.linears.append(_quantize_head(model, activations, calibration.samples, plan, device))
    _warn_if_undercalibrated(report, plan.in_features)
    _warn_of_surprises(plan)
    report.seconds = time.perf_counter() - start
    left_alone = tuple(dict.fromkeys([*config.modules_to_not_convert, *plan.left_alone]))
    config = replace(config, modules_to_not_convert=left_alone, module_group_sizes=plan.other_group_sizes)
    sizes = plan.group_sizes_of_blocks
    if len(sizes) == 1:
        # One size for all, even if not the one asked for, is what every engine can load.
        others = {name: size for name, size in plan.other_group_sizes.items() if name == LM_HEAD}
        config = replace(config, group_size=sizes.pop(), module_group_sizes=others)
    return config, report


@dataclass(frozen=True)
class _Plan:
    """What becomes of every linear, settled before any work is done.

    group_sizes: of the linears to quantize, by full name; left_alone: why each other linear stays as it is.
    in_features: of every linear of the blocks.
    """

    architecture: Architecture
    model_config: PretrainedConfig
    config: QuantConfig
    group_sizes: dict[str, int]
    left_alone: dict[str, str]
    in_features: dict[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel, config: QuantConfig) -> _Plan:
        architecture = architecture_of(model.config)
        plan = cls(architecture, model.config, config, {}, {}, {})
        for index, block in enumerate(architecture.decoder_blocks(model)):
            prefix = f"{architecture.blocks}.{index}"
            architecture.check_block(block, prefix)
            _check_in_memory(block, prefix)
            for leaf, linear in named_linears(block):
                plan._settle(f"{prefix}.{leaf}", linear)
        if config.lm_head_bits is not None:
            plan._settle(LM_HEAD, _head(model))
        if not plan.group_sizes:
            name, reason = next(iter(plan.left_alone.items()), ("the list of blocks", "it is empty"))
            raise QuantizationError(f"nothing to quantize: every linear is left as it is ({name}: {reason})")
        return plan

    def _settle(self, name: str, linear: nn.Linear) -> None:
        self.in_features[name] = linear.in_features
        config = self.config
        size = config.group_size_for(name, linear.in_features)
        if not config.converts(name):
            self.left_alone[name] = "listed in modules_to_not_convert"
        elif size is None:
            smaller = "nor a smaller one " if config.indivisible == "smaller" else ""
            self.left_alone[name] = (
                f"group size {config.group_size} {smaller}does not divide {linear.in_features} inputs"
            )
        else:
            spec = LinearSpec.of(linear, config.bits_for(name), size, config.zero_point)
            obstacle = get_format(config.version_for(name)).obstacle(spec)
            if obstacle is None:
                self.group_sizes[name] = size
            else:
                self.left_alone[name] = obstacle

    @property
    def groups(self) -> list[ScaleGroup]:
        """The groups whose scales this run searches."""
        if not self.config.apply_scale:
            return []
        return self.architecture.groups(self.model_config, self.config.scale_activations)

    @property
    def tunes(self) -> bool:
        """Whether blocks are tuned, on what the quantized blocks before them give."""
        return self.config.effort == "best"

    @property
    def batch_tokens(self) -> int:
        return _TUNING_TOKENS if self.tunes else _BATCH_TOKENS

    @property
    def group_sizes_of_blocks(self) -> set[int]:
        return {size for name, size in self.group_sizes.items() if name != LM_HEAD}

    @property
    def other_group_sizes(self) -> dict[str, int]:
        """The linears that got another group size than the config's."""
        return {name: size for name, size in self.group_sizes.items() if size != self.wanted_group_size(name)}

    def wanted_group_size(self, name: str) -> int:
        """The group size the config asks for, for a linear."""
        return self.config.lm_head_group_size if name == LM_HEAD else self.config.group_size

    def fake_quantize(self, name: str, group_size: int | None = None) -> awq.FakeQuantize:
        """The rounding of a linear, at its own group size or another."""
        size = self.group_sizes[name] if group_size is None else group_size
        bits = self.config.bits_for(name)
        return partial(fake_quantize, bits=bits, group_size=size, zero_point=self.config.zero_point)


def _quantize_blocks(
    blocks: nn.ModuleList, activations: _Activations, plan: _Plan, devices: Sequence[torch.device], progress: bool
) -> list[LinearReport]:
    """Walks the blocks. What flows between them does not depend on the search, so where there are several devices, a
    block is observed on one while those before it are searched on the others. Tuning is another matter: it wants what
    the quantized blocks before give."""
    searches: list[Future[list[LinearReport]]] = []
    quantized = replace(activations, hidden_states=list(activations.hidden_states))
    with ThreadPoolExecutor(max(1, len(devices))) as pool:
        search = pool.submit if len(devices) > 1 and not plan.tunes else _at_once
        for index, block in enumerate(tqdm(blocks, desc="quantizing", unit="block", disable=not progress)):
            if len(searches) >= len(devices) > 0:
                searches[-len(devices)].result()  # the device is free again
            prefix = f"{plan.architecture.blocks}.{index}"
            home = _device_of(block)
            if devices:
                block.to(devices[index % len(devices)])
            statistics = _observe(block, prefix, activations, index, plan)
            batches = _tuning_batches(quantized, activations, index) if plan.tunes else []
            searches.append(search(_search_block, block, prefix, statistics, plan, home, batches, quantized))
    return [report for done in searches for report in done.result()]


def _at_once(function: Callable[..., Any], *args: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(function(*args))
    return done


def _search_block(
    block: nn.Module,
    prefix: str,
    statistics: dict[str, InputStatistics],
    plan: _Plan,
    home: torch.device,
    batches: Sequence[tuning.Batch],
    quantized: _Activations,
) -> list[LinearReport]:
    """Quantizes a block where it is and brings it home.

    batches: what to tune it on; then `quantized`, what flows between the quantized blocks, flows through it too.
    """
    with torch.no_grad():  # which every thread decides for itself
        reports = _quantize_block(block, prefix, statistics, plan, batches)
        device = _device_of(block)
        for index, batch in enumerate(batches):
            keywords = {name: _to_device(value, device) for name, value in batch.keywords.items()}
            quantized.hidden_states[index] = _output_of(block, batch.inputs.to(device), keywords)
        if _device_of(block) != home:
            block.to(home)
    return reports


def _device_of(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def _check_in_memory(block: nn.Module, prefix: str) -> None:
    for name, parameter in block.named_parameters():
        if parameter.is_meta:
            raise QuantizationError(
                f"the weight {prefix}.{name} is not in memory (it is offloaded); "
                "load the model on the CPU (device_map='cpu'), and have its blocks quantized on a GPU (device='cuda')"
            )


class _LastBlockReached(Exception):
    """Ends a forward pass that was started only for what reaches some blocks."""


@dataclass
class _Activations:
    """What flows between blocks, by batch.

    hidden_states: `[samples, tokens, hidden]`.
    keywords: the keyword arguments blocks get with them, for each kind of block.
    kinds: the kind of every block.
    """

    hidden_states: list[Tensor]
    keywords: list[dict[str, dict[str, Any]]]
    kinds: list[str]

    def keywords_of(self, batch: int, number: int, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of a block, by its number, for a batch."""
        return {name: _to_device(value, device) for name, value in self.keywords[batch][self.kinds[number]].items()}


def _block_kinds(model: PreTrainedModel, count: int) -> list[str]:
    """What tells blocks apart by their arguments: full and sliding attention have masks of their own."""
    kinds = getattr(model.config, "layer_types", None)
    return list(kinds) if kinds is not None and len(kinds) == count else ["all"] * count


def _batches(samples: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """Stacks samples of one length, `[samples, tokens]`, with at most so many tokens or one sample in each.

    There is no padding, so every token counts and none is invented.
    """
    by_length: dict[int, list[Tensor]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    for length, same in by_length.items():
        count = max(1, tokens // length)
        for first in range(0, len(same), count):
            yield torch.stack(same[first : first + count])


def _block_inputs(
    model: PreTrainedModel, blocks: nn.ModuleList, samples: Sequence[Tensor], batch_tokens: int = _BATCH_TOKENS
) -> _Activations:
    """Runs the model as far as the first block of every kind."""
    kinds = _block_kinds(model, len(blocks))
    found = _Activations([], [], kinds)
    firsts = {kind: kinds.index(kind) for kind in kinds}

    def record(kind: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keywords = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if firsts[kind] == 0:
                found.hidden_states.append(args[0] if args else kwargs["hidden_states"])
                found.keywords.append({})
            found.keywords[-1][kind] = keywords
            if firsts[kind] == max(firsts.values()):
                raise _LastBlockReached

        return hook

    handles = [
        blocks[index].register_forward_pre_hook(record(kind), with_kwargs=True) for kind, index in firsts.items()
    ]
    try:
        for batch in _batches(samples, batch_tokens):
            with suppress(_LastBlockReached):
                model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _to_device(value: Any, device: torch.device) -> Any:
    """Moves the tensors of a keyword argument (some families pass tuples of them)."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(entry, device) for entry in value)
    return value


@contextmanager
def _input_hooks(block: nn.Module, leaders: Iterable[str], statistics: dict[str, InputStatistics]) -> Iterator[None]:
    """While open, adds the inputs of the linears named in `leaders` to their statistics."""

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            entry = statistics.get(name)
            if entry is None:
                entry = statistics[name] = InputStatistics(args[0].shape[-1], args[0].device)
            entry.add(args[0])

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(observe(name)) for name in leaders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    block: nn.Module, prefix: str, activations: _Activations, number: int, plan: _Plan
) -> dict[str, InputStatistics]:
    """Sends the activations through the block, in place; returns the statistics of every linear's inputs.

    Linears of one scale group read the same activation, so one of them is observed for all.
    """
    leader_of = {leaf: leaf for leaf, _ in named_linears(block)}
    for group in plan.architecture.groups(plan.model_config, scale_activations=True):
        leader_of.update(dict.fromkeys(group.linears, group.linears[0]))
    statistics: dict[str, InputStatistics] = {}
    device = _device_of(block)
    with _input_hooks(block, set(leader_of.values()), statistics):
        for index, hidden in enumerate(activations.hidden_states):
            keywords = activations.keywords_of(index, number, device)
            activations.hidden_states[index] = _output_of(block, hidden.to(device), keywords)
    for name, entry in statistics.items():
        if not entry.finish().is_finite():
            raise QuantizationError(
                f"the inputs of {prefix}.{name} hold NaN or infinity during calibration; load the model in bfloat16 "
                "or float32 (torch_dtype=...), or check its weights"
            )
    missing = next((leaf for leaf, leader in leader_of.items() if leader not in statistics), None)
    if missing is not None:
        raise QuantizationError(f"no calibration token reached {prefix}.{missing}; it cannot be quantized")
    return {leaf: statistics[leader] for leaf, leader in leader_of.items()}


def _output_of(block: nn.Module, hidden: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    output = block(hidden, **keywords)
    return output[0] if isinstance(output, tuple) else output


def _tuning_batches(quantized: _Activations, activations: _Activations, number: int) -> list[tuning.Batch]:
    """What a block is tuned on: it gets what the quantized blocks before it give, and should give what `activations`
    became in full precision."""
    kind = quantized.kinds[number]
    states = zip(quantized.hidden_states, activations.hidden_states, quantized.keywords, strict=True)
    return [tuning.Batch(inputs, target, keywords[kind]) for inputs, target, keywords in states]


def _quantize_block(
    block: nn.Module,
    prefix: str,
    statistics: dict[str, InputStatistics],
    plan: _Plan,
    batches: Sequence[tuning.Batch] = (),
) -> list[LinearReport]:
    """Searches, folds and rounds one block, and tunes it where there are batches to tune it on; its quantized linears
    become QuantLinear."""
    work = {leaf: _LinearWork(linear, f"{prefix}.{leaf}") for leaf, linear in named_linears(block)}
    for group in plan.groups:
        _scale_group(block, prefix, group, statistics[group.linears[0]], work, plan)
    inputs: dict[int, _ScaledInputs] = {}
    rounded: dict[str, QuantizedWeight] = {}
    for leaf, item in work.items():
        if item.name in plan.group_sizes:
            # Linears that share statistics are of one scale group, so they share the scaled inputs too.
            key = id(statistics[leaf])
            if key not in inputs:
                inputs[key] = _ScaledInputs(statistics[leaf], item.column_scale, plan.config.compensate)
            rounded[leaf] = _round_linear(leaf, item, inputs[key], plan)
    if batches:
        weights = {leaf: (work[leaf].linear.weight.detach(), weight) for leaf, weight in rounded.items()}
        rounded = tuning.tune_block(block, weights, batches)
    reports = []
    for leaf, item in work.items():
        if leaf in rounded:
            module, report = _finish_linear(item, rounded[leaf], inputs[id(statistics[leaf])], plan)
            replace_module(block, leaf, module)
        else:
            item.restore()
            report = LinearReport(item.name, None, None, None, None, 0, plan.left_alone[item.name])
        reports.append(report)
    return reports


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_submodule(LM_HEAD)
    if not isinstance(head, nn.Linear):
        raise QuantizationError(f"{LM_HEAD} is a {type(head).__name__}, not a linear; leave lm_head_bits out")
    return head


def _quantize_head(
    model: PreTrainedModel,
    activations: _Activations,
    samples: Sequence[Tensor],
    plan: _Plan,
    device: torch.device | None,
) -> LinearReport:
    """Quantizes the output head, with what the blocks made of the calibration data as its inputs; on a device, or where
    it is.

    A head that is tied to the embeddings is untied: they stay as they are.
    """
    head = _head(model)
    home = head.weight.device
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)  # its own: moving it moves no embeddings
    if device is not None:
        head.to(device)
    statistics = InputStatistics(head.in_features, head.weight.device)

    def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
        statistics.add(args[0])
        raise _LastBlockReached

    hook = head.register_forward_pre_hook(observe)
    try:
        for hidden, batch in zip(activations.hidden_states, _batches(samples, plan.batch_tokens), strict=True):
            with _blocks_that_give(hidden, model, plan), suppress(_LastBlockReached):
                model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        hook.remove()
    if not statistics.finish().is_finite():
        raise QuantizationError(
            f"the inputs of {LM_HEAD} hold NaN or infinity during calibration; load the model in bfloat16 or float32 "
            "(torch_dtype=...), or check its weights"
        )
    item = _LinearWork(head, LM_HEAD)
    inputs = _ScaledInputs(statistics, item.column_scale, plan.config.compensate)
    module, report = _finish_linear(item, _round_linear(LM_HEAD, item, inputs, plan), inputs, plan)
    replace_module(model, LM_HEAD, module.to(home))
    model.config.tie_word_embeddings = False
    return report


@contextmanager
def _blocks_that_give(hidden: Tensor, model: PreTrainedModel, plan: _Plan) -> Iterator[None]:
    """While open, the blocks of the model compute nothing, and the last gives `hidden`."""
    blocks = plan.architecture.decoder_blocks(model)
    in_tuple = plan.architecture.block(plan.model_config).returns_tuple
    hidden = hidden.to(_device_of(blocks[-1]))

    def give(*_args: Any, **_kwargs: Any) -> Any:
        return (hidden, None) if in_tuple else hidden

    own = [block.__dict__.get("forward") for block in blocks]  # of the instance: accelerate's, say
    for block in blocks:
        block.forward = give
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


class _LinearWork:
    """A linear while its block is worked on: in fp32 whatever the model's dtype, and what was folded into it."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        if not torch.isfinite(linear.weight).all():
            raise QuantizationError(f"the weight of {name} holds NaN or infinity; check the checkpoint it came from")
        self.linear = linear
        self.name = name
        self.dtype = linear.weight.dtype
        self.original = linear.weight.detach().float()
        self.column_scale = torch.ones(linear.in_features, device=linear.weight.device)
        self.row_scale = torch.ones(linear.out_features, device=linear.weight.device)
        self._cast(torch.float32)

    def _cast(self, dtype: torch.dtype) -> None:
        # A copy: the original stays for the report.
        self.linear.weight = nn.Parameter(self.linear.weight.detach().to(dtype, copy=True), requires_grad=False)
        if self.linear.bias is not None:
            self.linear.bias = nn.Parameter(self.linear.bias.detach().to(dtype), requires_grad=False)

    def restore(self) -> None:
        """Back to the model's dtype, for a linear that is not quantized."""
        self._cast(self.dtype)


def _scale_group(
    block: nn.Module,
    prefix: str,
    group: ScaleGroup,
    inputs: InputStatistics,
    work: dict[str, _LinearWork],
    plan: _Plan,
) -> None:
    """Searches one group's scale and folds it.

    A group that touches a linear to be left as it is is left as it is: folding would change that linear's weight.
    """
    touched = [leaf for leaf in (group.prev, *group.linears) if leaf in work]
    if any(work[leaf].name not in plan.group_sizes for leaf in touched):
        return
    if group.activation:
        act = ScaledActivation(block.get_submodule(group.prev), inputs.gram.shape[0], work[group.linears[0]].dtype)
        replace_module(block, group.prev, act.to(inputs.gram.device))
    prev = block.get_submodule(group.prev)
    weight = torch.cat([work[leaf].linear.weight for leaf in group.linears])
    first = work[group.linears[0]].name
    rows = None if group.rows is None else group.rows(plan.model_config).to(weight.device)
    magnitude = awq.weight_magnitude(weight, plan.group_sizes[first]) if plan.config.duo_scaling else None
    candidates = awq.candidate_scales(inputs.mean_absolute, magnitude, awq.SCALE_GRID, rows)
    scale = awq.search_scale(weight, inputs.gram, plan.fake_quantize(first), candidates)
    scale = awq.fold_scale(prev, [work[leaf].linear for leaf in group.linears], scale, rows)
    for leaf in group.linears:
        work[leaf].column_scale = scale
    if isinstance(prev, nn.Linear):
        work[group.prev].row_scale = awq.scale_by_row(prev.out_features, scale, rows)


class _ScaledInputs:
    """The inputs some linears read once their scale is folded, and what rounding needs to know of them."""

    def __init__(self, inputs: InputStatistics, scale: Tensor, compensate: bool) -> None:
        self.original = inputs.gram
        self.tokens = inputs.tokens
        self.gram = inputs.gram / torch.outer(scale, scale)
        self.compensator = Compensator(self.gram) if compensate else None


def _round_linear(leaf: str, item: _LinearWork, inputs: _ScaledInputs, plan: _Plan) -> QuantizedWeight:
    """Clips and rounds one linear whose scales are folded."""
    config = plan.config
    group_size = plan.group_sizes[item.name]
    weight = item.linear.weight.detach()
    clipped = weight
    if config.apply_clip and leaf.rpartition(".")[2] not in plan.architecture.unclipped:
        rounding = plan.fake_quantize(item.name, -1)
        limits = awq.search_clip(weight, inputs.gram, rounding, group_size)
        clipped = awq.clip(weight, limits)
        if config.effort != "fast" and config.zero_point:
            clipped = refinement.search_range(weight, inputs.gram, rounding, limits).clamp(weight)
    try:
        quantized = quantize(clipped, config.bits_for(item.name), group_size, config.zero_point)
    except QuantizationError as error:
        raise QuantizationError(f"{item.name}: {error}") from None
    if inputs.compensator is not None:
        quantized = inputs.compensator.round(weight, quantized)
        if config.effort != "fast":
            quantized = refinement.refine(weight, inputs.gram, quantized)
    return quantized


def _finish_linear(
    item: _LinearWork, quantized: QuantizedWeight, inputs: _ScaledInputs, plan: _Plan
) -> tuple[QuantLinear, LinearReport]:
    """The module that takes a linear's place, and what the report says of it."""
    wanted = plan.wanted_group_size(item.name)
    bias = None if item.linear.bias is None else item.linear.bias.detach().to(item.dtype)
    searched = dequantize(quantized) / item.column_scale * item.row_scale.unsqueeze(1)
    nearest = plan.fake_quantize(item.name)(item.original)
    energy = awq.output_error(item.original, inputs.original).clamp(min=torch.finfo(torch.float32).tiny)
    report = LinearReport(
        name=item.name,
        bits=quantized.bits,
        group_size=plan.group_sizes[item.name],
        error_before=float(awq.output_error(nearest - item.original, inputs.original) / energy),
        error_after=float(awq.output_error(searched - item.original, inputs.original) / energy),
        tokens=inputs.tokens,
        note="" if plan.group_sizes[item.name] == wanted else f"group size {wanted} does not divide its inputs",
    )
    return QuantLinear.from_weight(quantized, bias), report


def _warn_of_surprises(plan: _Plan) -> None:
    """Says what the user may not expect of the result."""
    for pattern in plan.config.modules_to_not_convert:
        if pattern not in "lm_head" and not any(pattern in name for name in plan.in_features):
            warnings.warn(f"modules_to_not_convert: no linear of the blocks has {pattern!r} in its name", stacklevel=4)
    if len(plan.group_sizes_of_blocks) > 1:
        others = {name: size for name, size in plan.other_group_sizes.items() if name != LM_HEAD}
        name, size = next(iter(others.items()))
        warnings.warn(
            f"the group size {plan.config.group_size} does not divide the inputs of {len(others)} "
            f"linears, which got a smaller one ({name}: {size}). autoq loads such a checkpoint; engines with one group "
            f'size for all, such as vLLM, do not: for them choose group_size={size} or indivisible="skip".',
            stacklevel=4,
        )


def _warn_if_undercalibrated(report: QuantizationReport, widths: dict[str, int]) -> None:
    """Fewer tokens than input channels leave directions of the input unseen: the search would trust noise."""
    starved = [entry for entry in report.quantized if entry.tokens < widths[entry.name]]
    if starved:
        worst = max(starved, key=lambda entry: widths[entry.name] / max(entry.tokens, 1))
        warnings.warn(
            f"too little calibration data: {len(starved)} of {len(report.quantized)} linears saw fewer tokens than "
            f"they have input channels ({worst.name}: {worst.tokens} tokens, {widths[worst.name]} channels); the "
            "scales are unreliable. Give more or longer samples (calib_data, max_calib_samples, max_calib_seq_len).",
            stacklevel=4,
        )
