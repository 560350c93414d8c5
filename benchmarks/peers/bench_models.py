"""Whole models: the engines, the files they load, and the cases they are measured in."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from peers import machine
from peers.bench import Bench, say
from peers.worker import Worker, WorkerError

# Of the same model two engines give logits that correlate better than this, even with activations in 8 bits.
_SAME_MODEL = 0.99
_USABLE = 0.8  # of the memory that is there


class Engine(NamedTuple):
    """How a model is run, and on what: a file that `_files` or `_llamacpp_files` writes."""

    package: str  # whose Python runs it, see --python
    module: str
    cls: str
    file: str
    reference: str  # the model that its logits are compared with
    options: dict[str, Any] = {}  # noqa: RUF012 - keywords of from_quantized; nobody writes to them


ENGINES = {
    "autoq": Engine("autoq", "torch_models", "AutoQ", "asymmetric", "asymmetric"),
    "autoq int8": Engine("autoq", "torch_models", "AutoQ", "asymmetric", "asymmetric", {"mode": "int8"}),
    "autoq, 8-bit head": Engine("autoq", "torch_models", "AutoQ", "asymmetric_head8", "asymmetric_head8"),
    "autoq, 4-bit head": Engine("autoq", "torch_models", "AutoQ", "asymmetric_head4", "asymmetric_head4"),
    "autoq 3 bits, 4-bit head": Engine("autoq", "torch_models", "AutoQ", "3bit_head4", "3bit_head4"),
    "llama.cpp Q4_0": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_0.gguf", "symmetric"),
    "llama.cpp Q4_1": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_1.gguf", "asymmetric"),
    "llama.cpp Q4_K_M": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_K_M.gguf", "bf16"),
    "transformers bf16": Engine("transformers", "torch_models", "Transformers", "bf16", "bf16"),
}


class ModelBench:
    """What is measured with whole models, and added to the results of a run."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._arguments, self._results = bench, bench.arguments, bench.results
        self._weight_bytes: dict[str, int] = {}
        self._cache_bytes = 0

    def measure(self, folder: Path) -> None:
        engines = self._engines()
        written = self._files(folder, {engine.file for engine, _ in engines.values()})
        engines = {name: found for name, found in engines.items() if found[0].file in written}
        workers = self._load(engines, folder)
        for threads in self._arguments.threads:
            for batch in self._arguments.batches:
                for depth in self._arguments.depths:
                    self._decode(workers, threads, batch, depth)
            self._bench.save()
            for tokens in self._arguments.prompts:
                self._prefill(workers, threads, tokens)
            self._bench.save()
        for name, worker in workers.items():
            self._results["engines"][name]["peak_memory"] = worker.call("memory")
            self._bench.end(worker)
        self._bench.save()

    def _engines(self) -> dict[str, tuple[Engine, dict[str, Any]]]:
        """The engines by name, with their options."""
        engines: dict[str, tuple[Engine, dict[str, Any]]] = {}
        for name in self._arguments.engines:
            engines[name] = ENGINES[name], ENGINES[name].options
            if name == "autoq":
                variants = self._arguments.variant.items()
                engines |= {f"autoq {variant}": (ENGINES[name], options) for variant, options in variants}
        return engines

    def _files(self, folder: Path, wanted: set[str]) -> set[str]:
        """Writes the files the engines load; returns those that could be written."""
        prepare = self._bench.prepare()
        if prepare is None:
            return set()
        others = {file for file in wanted if not file.endswith(".gguf")}
        llamacpp = None if wanted == others else self._llamacpp(prepare)
        if llamacpp is None:
            wanted = others
        for kind in sorted({engine.reference for engine in ENGINES.values() if engine.file in wanted}):
            say(f"writing the model, {kind}")
            shape = {"shape": self._arguments.shape, "layers": self._arguments.layers}
            self._cache_bytes = prepare.call("model", **shape, folder=str(folder), kind=kind)["cache_bytes"]
        if llamacpp is not None:
            try:
                self._llamacpp_files(prepare, llamacpp, folder, wanted - others)
            except WorkerError as error:
                self._bench.leave_out("llama.cpp", error)
                wanted = others
            self._bench.end(llamacpp)
        self._bench.end(prepare)
        return wanted

    def _llamacpp(self, prepare: Worker) -> Worker | None:
        if prepare.call("can_write_gguf"):
            return self._bench.start("llama.cpp", "llama.cpp", "llamacpp", "LlamaCpp")
        self._bench.leave_out("llama.cpp", "gguf is not installed")
        return None

    def _llamacpp_files(self, prepare: Worker, llamacpp: Worker, folder: Path, wanted: set[str]) -> None:
        """Makes llama.cpp's usual files of those with the same blocks, which are checked and deleted."""
        for engine in (engine for engine in ENGINES.values() if engine.file in wanted):
            source, target = folder / f"{engine.reference}.gguf", folder / engine.file
            same = None
            if engine.reference != "bf16":
                same = str(source)
                self._check(llamacpp, source, target.stem)
            llamacpp.call("quantize", source=str(source), target=str(target), kind=target.stem)
            self._weight_bytes[engine.file] = prepare.call("gguf", path=str(target), same_as=same)
            source.unlink()

    def _check(self, llamacpp: Worker, source: Path, kind: str) -> None:
        """Ends the run if llama.cpp, from the blocks and a bf16 head, computes another model than ours."""
        llamacpp.call("load", path=str(source))
        found = llamacpp.call("correlation", reference=str(source.with_suffix(".npz")))
        llamacpp.call("close")
        self._results["same_blocks"][kind] = found
        say(f"llama.cpp's logits from {kind} blocks correlate with ours: {found:.5f}")
        if found < _SAME_MODEL:
            raise SystemExit(
                f"llama.cpp computes another model from {kind} blocks: its logits correlate only {found:.5f}"
            )

    def _load(self, engines: dict[str, tuple[Engine, dict[str, Any]]], folder: Path) -> dict[str, Worker]:
        """Workers with their models, of the engines that fit the memory together."""
        sizes = {name: _size(folder / engine.file) for name, (engine, _) in engines.items()}
        available = machine.available_memory()
        while available is not None and sum(sizes.values()) > _USABLE * available:
            largest = max(sizes, key=lambda name: sizes[name])
            self._bench.leave_out(
                largest, f"the models need more than the {available / 1e9:.0f} GB of memory there are"
            )
            del sizes[largest]
        workers = {}
        for name in sizes:
            engine, options = engines[name]
            worker = self._bench.start(name, engine.package, engine.module, engine.cls)
            if worker is None:
                continue
            try:
                weight_bytes = worker.call("load", path=str(folder / engine.file), **options)
                correlation = worker.call("correlation", reference=str(folder / f"{engine.reference}.npz"))
            except WorkerError as error:
                self._bench.leave_out(name, error)
                continue
            self._results["engines"][name] = {
                "file_bytes": sizes[name],
                "weight_bytes": weight_bytes or self._weight_bytes[engine.file],
                # With the first tokens, since files that are mapped are read only then.
                "loading_peak_memory": worker.call("memory"),
                "correlation": correlation,
            }
            workers[name] = worker
        return workers

    def _decode(self, workers: dict[str, Worker], threads: int, batch: int, depth: int) -> None:
        steps = self._arguments.steps
        cache = batch * depth * self._cache_bytes
        available = machine.available_memory()
        if available is not None and len(workers) * cache > _USABLE * available:
            self._bench.leave_out(f"batch {batch} at depth {depth}", "the caches do not fit the memory")
            return
        say(f"decode: {threads} threads, batch {batch}, depth {depth}")
        self._bench.each(workers, "release")
        self._bench.each(workers, "prepare", batch=batch, depth=depth, steps=steps, threads=threads)
        found = self._bench.rounds(
            workers,
            threads,
            self._arguments.rounds,
            lambda name: statistics.median(workers[name].call("decode", steps=steps)),
        )
        read = batch * (depth + steps / 2) * self._cache_bytes
        case = {"threads": threads, "batch": batch, "depth": depth, "tokens": batch}
        for name, measured in found.items():
            weights = self._results["engines"][name]["weight_bytes"]
            self._results["decode"].append(case | measured | {"engine": name, "bytes": weights + read})

    def _prefill(self, workers: dict[str, Worker], threads: int, tokens: int) -> None:
        say(f"prefill: {threads} threads, {tokens} tokens")
        self._bench.each(workers, "release")
        self._bench.each(workers, "prefill", tokens=min(tokens, 64), threads=threads)
        found = self._bench.rounds(
            workers,
            threads,
            min(self._arguments.rounds, 3),
            lambda name: workers[name].call("prefill", tokens=tokens, threads=threads),
        )
        case = {"threads": threads, "prompt": tokens, "tokens": tokens}
        for name, measured in found.items():
            moved = self._results["engines"][name]["weight_bytes"] + tokens * self._cache_bytes
            self._results["prefill"].append(case | measured | {"engine": name, "bytes": moved})


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size
