"""Quantizes a model block by block: fetch, observe the inputs, search, fold, round, replace, write, free."""

from __future__ import annotations

import hashlib
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from autoq.config import LM_HEAD, QuantConfig
from autoq.errors import ConfigError
from autoq.nn import QuantEmbedding, QuantLinear, ScaledActivation
from autoq.nn.linear import replace_module
from autoq.nn.spread import (
    DiskWeights,
    bring,
    fetch_from_disk,
    is_offloaded,
    read_ahead,
    remove_hooks,
    weights_of,
)
from autoq.quantization.activations import check_statistics, device_of, observe
from autoq.quantization.allocation import allocate_bits
from autoq.quantization.awq_cache import check_writable, fit_to_model, read_awq_cache, write_awq_cache
from autoq.quantization.budget import Load, resident_bytes, settle_memory
from autoq.quantization.calibration import CalibrationSet
from autoq.quantization.embeddings import quantize_embeddings
from autoq.quantization.head import quantize_head, share_head
from autoq.quantization.held_out import compare_held_out
from autoq.quantization.plan import Plan, name_of_embeddings
from autoq.quantization.ranks import Ranks
from autoq.quantization.report import LinearReport, QuantizationReport
from autoq.quantization.search import BlockResult, SearchResults, quantize_block
from autoq.quantization.sensitivity import measure_sensitivities
from autoq.quantization.sources import StatisticsSource, block_key
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.streams import Streams
from autoq.quantization.workspace import (
    StatisticsStore,
    Workspace,
    fingerprint_of_model,
    fingerprint_of_samples,
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
    device: torch.device
    offloaded: bool
    owner: int
    work: Callable[[], Future[BlockResult]] | None  # None: done in an earlier run
    future: Future[BlockResult] | None = None

    def start(self) -> None:
        if self.future is None and self.work is not None:
            self.future = self.work()


class _Writer:
    """Writes one block at a time while the run goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins to write, after `wait`."""
        self._work = self._pool.submit(work)

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown()


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
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._clock = Lock()
        self.plan = plan = Plan.of(model, config)
        self.run = run = run or Run()
        self.ranks = Ranks()
        self.search = SearchResults()
        self.blocks = plan.architecture.decoder_blocks(model)
        if is_offloaded(self.blocks) and self.ranks.size > 1 and run.work_dir is None:
            raise ConfigError("several processes quantize a model on the disk; give them one work_dir for the result")
        if plan.tunes and self.ranks.size > 1 and run.work_dir is None:
            raise ConfigError(
                "several processes tune each block on the samples of all (effort='best'); give them one work_dir, "
                "where each finds the others'"
            )
        held_out: Sequence[Tensor] = () if run.held_out is None else run.held_out.samples
        identity = {
            "model": fingerprint_of_model(model) if run.work_dir or run.statistics else "",
            "samples": fingerprint_of_samples(calibration.samples),
            "calibration": calibration.describe(),
            "tokens": calibration.tokens,
        }
        # Blocks that are observed before the first of them is done; one that is tuned waits for what the one before it
        # gives.
        self.width = 1 if plan.tunes else max(len(run.devices), self.ranks.size)
        store = None if run.statistics is None else StatisticsStore(run.statistics, identity)
        self.source = StatisticsSource(plan, calibration, store, self.ranks)
        calibrating = self.ranks.share(calibration.samples) if self.source.collects else ()
        held_out = self.ranks.share(held_out, "held-out") if held_out else ()
        load = Load(
            tokens=sum(map(len, calibrating)),
            held_out_tokens=sum(map(len, held_out)),
            longest=max(map(len, (*calibrating, *held_out)), default=0),
            processes=self.ranks.size,
            width=self.width,
            device=run.devices[0] if run.devices else None,
            resident=int(self.ranks.largest(resident_bytes())),
            statistics=None if store is None or store.is_complete else store.directory,
        )
        spills, expected = self.ranks.alone(
            lambda: settle_memory(model, plan, load, max_memory=run.max_memory, work_dir=run.work_dir)
        )
        keeps = run.work_dir is not None or spills
        self.workspace = Workspace(self._work_dir()) if keeps or is_offloaded(self.blocks) else None
        self.known, self.done = self.ranks.alone(lambda: self._admit(identity))
        if run.progress and self.ranks.is_first:
            if self.done:
                print(f"{self.done} of {len(self.blocks)} blocks are done in {run.work_dir}; going on from there")
            print(f"quantizing takes {expected.for_share(1 - self.done / len(self.blocks))}")
        if config.target_bits is not None:
            with self._timed("measuring"):
                self.plan = plan = self._mix(config.target_bits)
        # What takes the place of the model's own when the run ends, and its part of the report.
        self.embeddings: QuantEmbedding | None = None
        self.embeddings_line: LinearReport | None = None
        if plan.embeddings is not None:
            device = run.devices[0] if run.devices else None
            with self._timed("embeddings"):
                self.embeddings, self.embeddings_line = quantize_embeddings(
                    model, plan, self.ranks, device, self.source.tokens
                )
        folder, peers = None, []
        if self.workspace is not None and keeps:
            folder = self.workspace.activations_path(self.ranks.rank, self.ranks.size)
            size = self.ranks.size
            peers = [
                (self.ranks.share(calibration.samples, rank=rank), self.workspace.activations_path(rank, size))
                for rank in range(size)
                if plan.tunes and rank != self.ranks.rank
            ]
        probe = calibration.samples[0][:_PROBE_TOKENS]
        self.streams = Streams(model, plan, calibrating, probe, held_out, folder, self.done, self.embeddings, peers)

    def _work_dir(self) -> Path:
        """The directory of the run; one that goes with the model if the user gave none."""
        if self.run.work_dir is not None:
            return self.run.work_dir
        directory = Path(self.ranks.tell(tempfile.mkdtemp(prefix="autoq-") if self.ranks.is_first else ""))
        if self.ranks.is_first:
            weakref.finalize(self.model, rmtree, directory, ignore_errors=True)
        return directory

    def _admit(self, identity: Mapping[str, Any]) -> tuple[SearchResults | None, int]:
        """Opens what the first process reads and writes; raises what would otherwise end the run after hours. Returns
        the search results to apply, if there are, and how many blocks are done."""
        run = self.run
        known, digest, done = None, None, 0
        if run.awq_cache is not None and run.awq_cache.exists():
            known = fit_to_model(read_awq_cache(run.awq_cache), self.plan, len(self.blocks), run.awq_cache)
            digest = hashlib.sha256(run.awq_cache.read_bytes()).hexdigest()
        elif run.awq_cache is not None:
            check_writable(run.awq_cache)
        if self.workspace is not None:
            settings = {f"the setting {name}": value for name, value in asdict(self.plan.config).items()}
            settings["model"] = identity["model"]
            samples = {"calibration samples": self.source.samples(), "held-out samples": None}
            if run.held_out is not None:
                samples["held-out samples"] = fingerprint_of_samples(run.held_out.samples)
            used = {"statistics collected earlier": not self.source.collects, "search results": digest}
            done = self.workspace.finished(len(self.blocks))
            self.source.check(self.plan, done, run.work_dir)
            self.workspace.open(len(self.blocks), {**settings, **samples}, used, self.ranks.size)
        else:
            self.source.check(self.plan, 0, None)
        self.source.open()
        return known, done

    def _mix(self, target_bits: float) -> Plan:
        """The plan with the widths that a mean leaves room for; measured once in a run."""
        kept = None if self.workspace is None or not self.ranks.is_first else self.workspace.load_sensitivities()
        kept = self.ranks.tell(kept)
        if kept is None:
            # Every process measures: it waits no longer than for one of them, and all get the same.
            samples = [sample[:_PROBE_TOKENS] for sample in self.calibration.samples[:_SENSITIVITY_SAMPLES]]
            kept = measure_sensitivities(self.model, self.plan, samples, self.run.progress and self.ranks.is_first)
            if self.workspace is not None and self.ranks.is_first:
                self.workspace.save_sensitivities(kept)
        sensitivities = self.ranks.tell(kept)
        sizes = {name: spec.out_features * spec.in_features for name, spec in self.plan.specs.items()}
        return self.plan.with_bits(self.model, allocate_bits(sensitivities, sizes, target_bits))

    @torch.no_grad()
    def quantize(self) -> tuple[QuantConfig, QuantizationReport]:
        """Quantizes the model.

        Returns the config with what the run settled (linears left alone, other group sizes), and the report.
        Raises QuantizationError when a weight or an activation is not finite (the layer is named), or folding changes
        what a block computes. On an error, blocks written before it stay quantized.
        """
        report = self._walk()
        self.plan.warn_if_undercalibrated(report)
        self.plan.warn_of_surprises()
        report.seconds = time.perf_counter() - self._start
        report.seconds_by_part = dict(self._seconds)
        return self.plan.settled_config(), report

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """While open, time counts as spent on a part of the work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._clock:
                self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def _walk(self) -> QuantizationReport:
        """Walks the blocks. What flows between them does not depend on the search, so where there are several devices
        or processes, a block is observed while those before it are searched; and a block is written while the next one
        is read and observed."""
        report = QuantizationReport(self.source.description, self.source.tokens)
        report.embeddings = self.embeddings_line
        pending: list[_Search] = []
        shown = self.run.progress and self.ranks.is_first
        with (
            ThreadPoolExecutor(max(1, len(self.run.devices))) as pool,
            _Writer() as writer,
            tqdm(total=len(self.blocks), initial=self.done, desc="quantizing", unit="block", disable=not shown) as bar,
        ):
            for index in range(len(self.blocks)):
                if len(pending) >= self.width:
                    report.linears += self._settle(pending, writer, bar)
                pending.append(self._begin(index, pool))
                if len(self.run.devices) > 1:
                    pending[-1].start()
            while pending:
                report.linears += self._settle(pending, writer, bar)
            self._wait_for(writer)
            self.streams.forget(len(self.blocks))
        head = None
        if self.plan.shares_head and self.embeddings is not None:
            head, line = share_head(self.model, self.plan, self.embeddings, self.source.tokens)
            report.linears.append(line)
        elif LM_HEAD in self.plan.group_sizes:
            with self._timed("head"):
                head, line = quantize_head(
                    self.model,
                    self.plan,
                    self.streams.calibration,
                    self.source,
                    self.ranks,
                    self.run.devices[0] if self.run.devices else None,
                    self.known,
                    self.search,
                )
            report.linears.append(line)
        if self.run.held_out is not None:
            source = self.run.held_out.source
            with self._timed("judging"):
                report.held_out = compare_held_out(self.model, self.plan, self.streams, head, self.ranks, source)
        if self.ranks.is_first:
            if self.run.awq_cache is not None and self.known is None:
                write_awq_cache(self.run.awq_cache, self.search)
            self.source.close(self.plan, len(self.blocks))
        self._place({LM_HEAD: head, name_of_embeddings(self.model): self.embeddings})
        return report

    def _place(self, ends: Mapping[str, nn.Module | None]) -> None:
        """Puts a quantized head and quantized embeddings in the place of the model's own, whose ties are gone with
        them."""
        for name, module in ends.items():
            if module is not None:
                replace_module(self.model, name, module)
                self.model.config.tie_word_embeddings = False

    def _begin(self, index: int, pool: ThreadPoolExecutor) -> _Search:
        """Fetches and observes a block; what is left is its search."""
        block, prefix = self.blocks[index], self.plan.block_name(index)
        owner = index % self.ranks.size
        offloaded = is_offloaded(block)
        done = index < self.done
        home = device_of(block)
        devices = self.run.devices
        device = devices[index % len(devices)] if devices else home
        if done and self.streams.are_past(index):
            return _Search(index, block, home, device, offloaded, 0, None)
        files = weights_of(block)
        with self._timed("reading"):
            if offloaded:
                bring(block, prefix)
            if device_of(block) != device:
                block.to(device)
            if index + 1 < len(self.blocks):
                read_ahead(self.blocks[index + 1])
        probe = self.streams.probe_of(index, device)
        statistics: dict[str, InputStatistics] = {}
        with self._timed("observing"):
            if not done and self.streams.calibration.batches:
                alone = len(devices) <= 1
                observed = observe(block, self.streams.calibration, self.plan, alone, home)
                statistics = self.source.gather(block_key(index), observed, owner)
            self.streams.through_full(index, block, home)
        if files is not None and owner != self.ranks.rank:
            # Another process searches it, and tells what it became.
            fetch_from_disk(self.model, prefix, files, home)
        if done:
            return _Search(index, block, home, device, offloaded, 0, None)
        if self.plan.tunes:
            self.ranks.wait()  # for the others' samples, which this block is tuned on

        def work() -> BlockResult:
            with self._timed("searching"), torch.no_grad():  # which every thread decides for itself
                found = statistics
                if not self.source.collects:
                    found = self.source.stored(block_key(index), device)
                check_statistics(found, f"{prefix}.")
                batches = self.streams.tuning_batches() if self.plan.tunes else ()
                return quantize_block(block, prefix, found, self.plan, probe, self.known, batches)

        several = len(devices) > 1
        start = (lambda: pool.submit(work)) if several else (lambda: _at_once(work))
        return _Search(index, block, home, device, offloaded, owner, start if owner == self.ranks.rank else None)

    def _settle(self, pending: list[_Search], writer: _Writer, bar: Any) -> list[LinearReport]:
        """Ends the first search, or all where several processes wait for each other; each has one of them."""
        self._wait_for(writer)  # a search takes long: not one more if its result cannot be written
        ended = pending[:] if self.ranks.size > 1 else pending[:1]
        del pending[: len(ended)]
        for search in ended:
            search.start()
        reports = []
        for search in ended:
            reports += self._finish(search, writer)
            bar.update(search.index >= self.done)
        return reports

    def _finish(self, search: _Search, writer: _Writer) -> list[LinearReport]:
        """Takes the result of a search to wherever it is needed, and forgets what is not needed any more: the inputs of
        blocks that are written."""
        index, block, prefix = search.index, search.block, self.plan.block_name(search.index)
        self._wait_for(writer)
        result = BlockResult([], SearchResults())
        tensors: dict[str, Tensor] = {}
        if index >= self.done:
            error: Exception | None = None
            try:
                if search.future is not None:
                    result = search.future.result()
                    tensors = dict(block.state_dict())
            except Exception as raised:  # whatever it is, the other processes wait to hear of it
                error = raised
            self.ranks.agree(error, search.owner)
        elif self.workspace is not None and self.ranks.is_first:
            tensors, result = self.workspace.load_block(index)
        mine = search.future is not None
        if not mine or self.ranks.size > 1:
            result = self.ranks.tell(result, search.owner)
            tensors = self.ranks.send(tensors, search.owner, search.device)
            if not mine:
                self._restore(block, prefix, tensors)
        if index >= self.done and self.workspace is not None and self.ranks.is_first:
            writer.start(partial(self.workspace.save_block, index, tensors, result))
        if self.run.awq_cache is not None:
            self.search.update(result.search)
        with self._timed("passing on"):
            self.streams.through_quantized(index, block, search.home)
        if search.offloaded and self.workspace is not None:
            loader = DiskWeights(index=self.workspace.offload_index(index, prefix, tensors))
            fetch_from_disk(self.model, prefix, loader, search.home)
        elif device_of(block) != search.home:
            block.to(search.home)
        self.streams.forget(index)
        return result.reports

    def _wait_for(self, writer: _Writer) -> None:
        """Until the first process has written the last block that was done; all hear of it if that fails."""
        with self._timed("writing"):
            self.ranks.alone(writer.wait)

    def _restore(self, block: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Makes a block what an earlier run or another process made of it."""
        remove_hooks(block)  # which would fetch what it was
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


def _at_once(work: Callable[[], BlockResult]) -> Future[BlockResult]:
    done: Future[BlockResult] = Future()
    try:
        done.set_result(work())
    except Exception as error:  # as a thread's Future would keep it
        done.set_exception(error)
    return done
