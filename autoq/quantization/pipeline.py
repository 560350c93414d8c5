"""Quantizes a model block by block: fetch, observe the inputs, search, fold, round, replace, write, free."""

from __future__ import annotations

import json
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from autoq.config import LM_HEAD, QuantConfig
from autoq.errors import QuantizationError
from autoq.nn import QuantLinear, ScaledActivation
from autoq.nn.linear import replace_module
from autoq.nn.spread import bring, fetch_from_disk, is_offloaded
from autoq.quantization import tuning
from autoq.quantization.activations import (
    Activations,
    check_statistics,
    device_of,
    observe,
    observe_head,
)
from autoq.quantization.allocation import allocate_bits
from autoq.quantization.awq_cache import read_awq_cache, write_awq_cache
from autoq.quantization.budget import settle_memory
from autoq.quantization.calibration import CalibrationSet
from autoq.quantization.held_out import HeldOut
from autoq.quantization.plan import Plan, head_of
from autoq.quantization.ranks import Ranks
from autoq.quantization.report import LinearReport, QuantizationReport
from autoq.quantization.search import (
    BlockResult,
    LinearWork,
    Probe,
    ScaledInputs,
    SearchResults,
    quantize_block,
    quantized_linear,
    report_of,
    round_linear,
)
from autoq.quantization.sensitivity import measure_sensitivities
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.workspace import (
    StatisticsStore,
    Workspace,
    fingerprint_of_model,
    fingerprint_of_samples,
    write_json,
)

# Tokens whose outputs are compared before and after scales are folded.
_PROBE_TOKENS = 64
# Samples, each of so many tokens, that tell how much a linear matters.
_SENSITIVITY_SAMPLES = 8


@dataclass(frozen=True)
class Run:
    """How a model is quantized, beside the settings of the result.

    devices: where blocks are run and searched, in turns; each goes back to where it was. Empty: where it is.
    max_memory: bytes of memory the process may take; what flows between blocks goes to the disk if need be.
    work_dir: where what is done is kept, so that a stopped run goes on from there; None: nowhere.
    statistics: a directory with the statistics of this model, used in the place of calibration, or to be filled.
    awq_cache: a file with search results, applied in the place of a search, or to be written.
    held_out: samples to judge the result by, which take no part in the calibration.
    progress: show a progress bar.
    """

    devices: Sequence[torch.device] = ()
    max_memory: int | None = None
    work_dir: Path | None = None
    statistics: Path | None = None
    awq_cache: Path | None = None
    held_out: CalibrationSet | None = None
    progress: bool = True


@dataclass
class _Search:
    """A block that was observed and is searched by one of the processes."""

    index: int
    block: nn.Module
    home: torch.device
    offloaded: bool
    owner: int
    work: Callable[[], Future[BlockResult]] | None  # None: done in an earlier run
    future: Future[BlockResult] | None = None

    def start(self) -> None:
        if self.future is None and self.work is not None:
            self.future = self.work()


class Quantizer:
    """One run over the decoder blocks of a model, whose linears are quantized in place."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, config: QuantConfig, calibration: CalibrationSet, run: Run | None = None
    ) -> None:
        """Settles everything that can be refused before the model is changed.

        model: a transformers causal LM in evaluation mode, in memory, or on the disk with accelerate's hooks: then each
            block is fetched when it is its turn, and goes back to the disk quantized.
        calibration: the token samples whose activations guide the search.

        Raises ArchitectureError for an unknown family or block, QuantizationError when nothing can be quantized,
        ConfigError when the memory does not suffice or a directory is another run's.
        """
        self.model, self.calibration = model, calibration
        self.plan = plan = Plan.of(model, config)
        self.run = run = run or Run()
        self.ranks = Ranks()
        self.search = SearchResults()
        self.blocks = plan.architecture.decoder_blocks(model)
        self.known = read_awq_cache(run.awq_cache) if run.awq_cache is not None and run.awq_cache.exists() else None
        self.store: StatisticsStore | None = None
        identity = fingerprint_of_model(model) if run.work_dir or run.statistics else ""
        if run.statistics is not None:
            self.store = StatisticsStore(run.statistics, identity)
        # Tuning wants the samples themselves.
        self.collects = plan.tunes or self.store is None or not self.store.is_complete
        held_out = () if run.held_out is None else run.held_out.samples
        own = 1 / self.ranks.size
        spills = settle_memory(
            self.model,
            plan,
            int(own * self.calibration.tokens) if self.collects else 0,
            int(own * sum(len(sample) for sample in held_out)),
            max_memory=run.max_memory,
            work_dir=run.work_dir,
            shows=run.progress and self.ranks.is_first,
        )
        self.workspace, folder = self._open_workspace(identity, spills)
        if config.target_bits is not None:
            self.plan = plan = self._mix(config.target_bits)
        done = 0 if self.workspace is None else self.workspace.finished(len(self.blocks))
        self.done = self.ranks.tell(done)

        def activations(samples: Sequence[Tensor], name: str) -> Activations:
            return Activations(self.model, plan, samples, None if folder is None else folder / name, self.done)

        calibrating = self.ranks.share(self.calibration.samples) if self.collects else ()
        self.activations = activations(calibrating, "calibration")
        self.quantized = activations(calibrating if plan.tunes else (), "calibration-quantized")
        self.probe = activations([self.calibration.samples[0][:_PROBE_TOKENS]], "probe")
        self.held_out: HeldOut | None = None
        if held_out:
            self.held_out = HeldOut(self.model, plan, self.ranks.share(held_out), folder, self.done)

    def _mix(self, target_bits: float) -> Plan:
        """The plan with the widths that a mean leaves room for; measured once in a run."""
        sensitivities: dict[str, dict[int, float]] = {}
        kept = None if self.workspace is None else self.workspace.sensitivities_path
        if self.ranks.is_first:
            if kept is not None and kept.is_file():
                stored = json.loads(kept.read_text(encoding="utf-8"))
                sensitivities = {name: {int(bits): e for bits, e in widths.items()} for name, widths in stored.items()}
            else:
                samples = [sample[:_PROBE_TOKENS] for sample in self.calibration.samples[:_SENSITIVITY_SAMPLES]]
                sensitivities = measure_sensitivities(self.model, self.plan, samples, self.run.progress)
                if kept is not None:
                    write_json(kept, sensitivities)
        sensitivities = self.ranks.tell(sensitivities)
        sizes = {name: spec.out_features * spec.in_features for name, spec in self.plan.specs.items()}
        return self.plan.with_bits(self.model, allocate_bits(sensitivities, sizes, target_bits))

    def _open_workspace(self, model: str, spills: bool) -> tuple[Workspace | None, Path | None]:
        """Where results are kept, and where hidden states are, if not in memory."""
        directory = self.run.work_dir
        if directory is None:
            if not spills and not is_offloaded(self.blocks):
                return None, None
            directory = Path(self.ranks.tell(tempfile.mkdtemp(prefix="autoq-") if self.ranks.is_first else ""))
            if self.ranks.is_first:
                weakref.finalize(self.model, rmtree, directory, ignore_errors=True)
        held_out = self.run.held_out
        identity = {
            "settings": asdict(self.plan.config),
            "model": model,
            "calibration samples": fingerprint_of_samples(self.calibration.samples),
            "held-out samples": None if held_out is None else fingerprint_of_samples(held_out.samples),
        }
        used = {
            "statistics collected earlier": not self.collects,
            "search results": None if self.known is None else fingerprint_of_samples(list(self.known.scales.values())),
        }
        workspace = Workspace(directory, len(self.blocks), identity, used)
        keeps = self.run.work_dir is not None or spills
        return workspace, directory / f"activations-{self.ranks.rank}-of-{self.ranks.size}" if keeps else None

    @torch.no_grad()
    def quantize(self) -> tuple[QuantConfig, QuantizationReport]:
        """Quantizes the model.

        Returns the config with what the run settled (linears left alone, other group sizes), and the report.
        Raises QuantizationError when a weight or an activation is not finite (the layer is named), or folding changes
        what a block computes. On an error, blocks done before it stay quantized.
        """
        start = time.perf_counter()
        report = self._walk()
        self.plan.warn_if_undercalibrated(report)
        self.plan.warn_of_surprises()
        report.seconds = time.perf_counter() - start
        return self.plan.settled_config(), report

    def _walk(self) -> QuantizationReport:
        """Walks the blocks. What flows between them does not depend on the search, so where there are several devices
        or processes, a block is observed while those before it are searched."""
        report = QuantizationReport(self._describe(), self._tokens())
        # A block that is tuned waits for what the one before gives.
        width = 1 if self.plan.tunes else max(len(self.run.devices), self.ranks.size)
        pending: list[_Search] = []
        shown = self.run.progress and self.ranks.is_first
        with (
            ThreadPoolExecutor(max(1, len(self.run.devices))) as pool,
            tqdm(total=len(self.blocks), initial=self.done, desc="quantizing", unit="block", disable=not shown) as bar,
        ):
            for index in range(len(self.blocks)):
                if len(pending) >= width:
                    report.linears += self._settle(pending, bar)
                pending.append(self._begin(index, pool))
                if len(self.run.devices) > 1:
                    pending[-1].start()
            while pending:
                report.linears += self._settle(pending, bar)
        head = self._quantize_head(report) if LM_HEAD in self.plan.group_sizes else None
        if self.held_out is not None and self.run.held_out is not None:
            source = self.run.held_out.source
            report.held_out = self.held_out.compare(self.model, self.plan, head, self.ranks, source)
        if head is not None:
            replace_module(self.model, LM_HEAD, head)
            self.model.config.tie_word_embeddings = False
        self._keep_findings()
        return report

    def _describe(self) -> str:
        if self.collects or self.store is None:
            return self.calibration.describe()
        return f"{self.store.description} (statistics collected earlier)"

    def _tokens(self) -> int:
        return self.calibration.tokens if self.collects or self.store is None else self.store.tokens

    def _begin(self, index: int, pool: ThreadPoolExecutor) -> _Search:
        """Fetches and observes a block; what is left is its search."""
        block, prefix = self.blocks[index], self.plan.block_name(index)
        owner = index % self.ranks.size
        offloaded = is_offloaded(block)
        done = index < self.done
        if done and self._all_are_past(index):
            return _Search(index, block, device_of(block), offloaded, 0, None)
        if offloaded:
            bring(block, prefix)
        home = device_of(block)
        devices = self.run.devices
        if devices:
            block.to(devices[index % len(devices)])
        device = device_of(block)
        statistics: dict[str, InputStatistics] = {}
        if self.activations.states.stage == index and self.activations.batches:
            if done:
                self.activations.advance(block)
            else:
                statistics = self._observe(index, block, owner)
        probe = None
        if self.probe.states.stage == index:
            probe = Probe(self.probe.states.read(0).to(device), self.probe.keywords(0, device))
            self.probe.advance(block)
        if self.held_out is not None and self.held_out.full.states.stage == index:
            self.held_out.full.advance(block)
        if done:
            return _Search(index, block, home, offloaded, 0, None)

        def work() -> BlockResult:
            with torch.no_grad():  # which every thread decides for itself
                found = (
                    statistics if self.collects or self.store is None else self.store.load(f"block-{index:05d}", device)
                )
                check_statistics(found, f"{prefix}.")
                batches = _TuningBatches(self.quantized, self.activations) if self.plan.tunes else ()
                return quantize_block(block, prefix, found, self.plan, probe, self.known, batches)

        several = len(devices) > 1
        start = (lambda: pool.submit(work)) if several else (lambda: _at_once(work))
        return _Search(index, block, home, offloaded, owner, start if owner == self.ranks.rank else None)

    def _all_are_past(self, index: int) -> bool:
        """Whether nothing has to go through this block any more: it was done in an earlier run."""
        streams = [self.activations, self.probe]
        if self.held_out is not None:
            streams += [self.held_out.full]
        return all(not stream.batches or stream.states.stage > index for stream in streams)

    def _observe(self, index: int, block: nn.Module, owner: int) -> dict[str, InputStatistics]:
        statistics = observe(block, self.activations, self.plan)
        self.ranks.gather(statistics, owner)
        if self.ranks.rank != owner:
            return {}
        if self.store is not None:
            for entry in statistics.values():
                entry.finish()
            self.store.save(f"block-{index:05d}", statistics)
        return statistics

    def _settle(self, pending: list[_Search], bar: Any) -> list[LinearReport]:
        """Ends the first search, or all where several processes wait for each other; each has one of them."""
        ended = pending[:] if self.ranks.size > 1 else pending[:1]
        del pending[: len(ended)]
        for search in ended:
            search.start()
        reports = []
        for search in ended:
            reports += self._finish(search)
            bar.update(search.index >= self.done)
        return reports

    def _finish(self, search: _Search) -> list[LinearReport]:
        """Takes the result of a search to wherever it is needed, and forgets what is not needed any more."""
        index, block, prefix = search.index, search.block, self.plan.block_name(search.index)
        device = search.home if not self.run.devices else self.run.devices[index % len(self.run.devices)]
        result = BlockResult([], SearchResults())
        tensors: dict[str, Tensor] = {}
        if index >= self.done:
            error: Exception | None = None
            try:
                if search.future is not None:
                    result = search.future.result()
                    tensors = dict(block.state_dict())
            except QuantizationError as raised:
                error = raised
            self.ranks.agree(error, search.owner)
        elif self.workspace is not None and self.ranks.is_first:
            tensors, result = self.workspace.load_block(index)
        mine = search.future is not None
        if not mine or self.ranks.size > 1:
            result = self.ranks.tell(result, search.owner)
            tensors = self.ranks.send(tensors, search.owner, device)
            if not mine:
                self._restore(block, prefix, tensors)
        if index >= self.done and self.workspace is not None and self.ranks.is_first:
            self.workspace.save_block(index, tensors, result)
        self.search.update(result.search)
        quantized = [self.quantized, *([] if self.held_out is None else [self.held_out.quantized])]
        for stream in quantized:
            if stream.batches and stream.states.stage == index:
                stream.advance(block)
        if search.offloaded and self.workspace is not None:
            loader = OffloadedWeightsLoader(index=self.workspace.offload_index(index, prefix, tensors))
            fetch_from_disk(self.model, prefix, loader, search.home)
        elif device_of(block) != search.home:
            block.to(search.home)
        self._forget(index + 1)
        return result.reports

    def _restore(self, block: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Makes a block what an earlier run or another process made of it."""
        remove_hook_from_submodules(block)  # which would fetch what it was
        for leaf, module in list(block.named_modules()):
            if f"{prefix}.{leaf}" in self.plan.specs:
                bias = getattr(module, "bias", None)
                replace_module(block, leaf, QuantLinear.empty(self.plan.specs[f"{prefix}.{leaf}"], bias))
        for group in self.plan.groups:
            if group.activation and f"{group.prev}.scales" in tensors:
                scales = tensors[f"{group.prev}.scales"]
                act = ScaledActivation(block.get_submodule(group.prev), scales.numel(), scales.dtype)
                replace_module(block, group.prev, act)
        block.load_state_dict(tensors, strict=True, assign=True)

    def _forget(self, index: int) -> None:
        """Deletes the inputs of blocks before one that a stopped run would not go back to."""
        streams = [self.activations, self.quantized, self.probe]
        if self.held_out is not None:
            streams += [self.held_out.full, self.held_out.quantized]
        for stream in streams:
            stream.states.forget(index)

    def _quantize_head(self, report: QuantizationReport) -> QuantLinear:
        """The output head, quantized with what the blocks made of the calibration data as its inputs.

        A head that is tied to the embeddings is untied: they stay as they are.
        """
        head = head_of(self.model)
        bring(head, LM_HEAD)
        home = head.weight.device
        device = self.run.devices[0] if self.run.devices else home
        work = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        work.weight = nn.Parameter(head.weight.detach().to(device), requires_grad=False)
        work.bias = None if head.bias is None else nn.Parameter(head.bias.detach().to(device), requires_grad=False)
        if self.collects or self.store is None:
            statistics = observe_head(self.model, head, self.activations, self.plan, device)
            self.ranks.gather({LM_HEAD: statistics}, 0)
            if self.store is not None and self.ranks.is_first:
                self.store.save(LM_HEAD, {LM_HEAD: statistics.finish()})
        else:
            statistics = self.store.load(LM_HEAD, device)[LM_HEAD]
        tensors: dict[str, Tensor] = {}
        line: LinearReport | None = None
        error: Exception | None = None
        if self.ranks.is_first:
            try:
                check_statistics({LM_HEAD: statistics})
                item = LinearWork(work, LM_HEAD)
                inputs = ScaledInputs(statistics, item.column_scale, self.plan.config.compensate)
                weight, clipped = round_linear(item, inputs, self.plan, self.known, self.search)
                line = report_of(item, weight, clipped, inputs, self.plan)
                tensors = dict(quantized_linear(item, weight).state_dict())
            except QuantizationError as raised:
                error = raised
        self.ranks.agree(error, 0)
        line = self.ranks.tell(line)
        tensors = self.ranks.send(tensors, 0, home)
        assert line is not None
        report.linears.append(line)
        quantized = QuantLinear.empty(self.plan.specs[LM_HEAD], head.bias)
        quantized.load_state_dict(tensors, strict=True, assign=True)
        return quantized

    def _keep_findings(self) -> None:
        """Writes what other runs may use."""
        if not self.ranks.is_first:
            return
        if self.run.awq_cache is not None and self.known is None:
            write_awq_cache(self.run.awq_cache, self.search)
        if self.store is not None and self.collects:
            names = [f"block-{index:05d}" for index in range(len(self.blocks))]
            names += [LM_HEAD] if LM_HEAD in self.plan.group_sizes else []
            self.store.finish(names, self.calibration.describe(), self.calibration.tokens)


class _TuningBatches(Sequence[tuning.Batch]):
    """What a block is tuned on: it gets what the quantized blocks before it give, and should give what the
    full-precision blocks, this one among them, gave. Read when they are used."""

    def __init__(self, quantized: Activations, full: Activations) -> None:
        self._quantized, self._full = quantized, full

    def __len__(self) -> int:
        return len(self._quantized.batches)

    def __getitem__(self, number: Any) -> Any:
        inputs = self._quantized.states.read(number)
        return tuning.Batch(inputs, self._full.states.read(number), self._quantized.keywords(number, inputs.device))


def _at_once(work: Callable[[], BlockResult]) -> Future[BlockResult]:
    done: Future[BlockResult] = Future()
    try:
        done.set_result(work())
    except QuantizationError as error:
        done.set_exception(error)
    return done
