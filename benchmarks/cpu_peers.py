"""autoq beside other engines on a CPU: whole models and single matmuls, in one run on the same weights.

    python benchmarks/cpu_peers.py [--shape tinyllama-1.1b] [--threads 1 2] [--python llama.cpp=PYTHON ...]
    python benchmarks/cpu_peers.py --quick        # a tiny model and few rounds, to see that everything works

Whole models: autoq, transformers in bf16, and llama.cpp (package llama-cpp-python) with Q4_0 and Q4_1 files that hold
the same codes and scales, and a Q4_K_M file made by llama.cpp's own quantizer. One matmul: autoq's linear, torch's int4
and bf16 kernels, onnxruntime's MatMulNBits, llama.cpp's mul_mat. What is not installed is left out, which the results
say. Every engine has a process of its own, which keeps its model; they take turns within each round, and so does a
probe of the read bandwidth, since a machine's speed drifts. Needs gguf to write llama.cpp's files.

Writes Markdown, JSON and, where matplotlib is installed, a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from peers import machine, report
from peers.worker import Worker, WorkerError
from shapes import SHAPES

# The fewest bytes the probe reads, and how many times the last-level cache it and the matmuls' weights exceed.
_LEAST_PROBE = 2**30
_PROBE_CACHES, _MATMUL_CACHES = 4, 2
# Of the same model two engines give logits that correlate better than this, even with activations in 8 bits.
_SAME_MODEL = 0.99
_QUICK = {
    "shape": "tiny", "layers": None, "rounds": 2, "steps": 3, "depths": [0, 32], "batches": [1, 2], "prompts": [32],
    "matmuls": ["256x512"], "rows": [1, 16], "output": None,
}  # fmt: skip


class Engine(NamedTuple):
    """How a model is run, and on what: a file that `_files` or `_llamacpp_files` writes."""

    package: str  # whose Python runs it, see --python
    module: str
    cls: str
    file: str
    reference: str  # the model that its logits are compared with


ENGINES = {
    "autoq": Engine("autoq", "torch_models", "AutoQ", "asymmetric", "asymmetric"),
    "llama.cpp Q4_0": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_0.gguf", "symmetric"),
    "llama.cpp Q4_1": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_1.gguf", "asymmetric"),
    "llama.cpp Q4_K_M": Engine("llama.cpp", "llamacpp", "LlamaCpp", "Q4_K_M.gguf", "bf16"),
    "transformers bf16": Engine("transformers", "torch_models", "Transformers", "bf16", "bf16"),
}
MATMULS = {
    "autoq": ("matmul_torch", "TorchMatmul"),
    "onnxruntime": ("matmul_onnx", "OnnxMatmul"),
    "llama.cpp": ("matmul_ggml", "GgmlMatmul"),
}
PACKAGES = ("autoq", "transformers", "llama.cpp", "onnxruntime")


def main() -> None:
    arguments = _arguments()
    bench = Bench(arguments)
    try:
        bench.start_probe()
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            if arguments.engines:
                bench.measure_models(Path(folder))
            bench.measure_matmuls(Path(folder))
    finally:
        bench.close()
    print(report.markdown(bench.results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing unless --output is given")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="blocks of the model, if not all of the shape's")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES), help="whole models")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=JSON",
        help="autoq once more, as `autoq NAME`, with these keywords of from_quantized",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[machine.describe()["cores"]])
    parser.add_argument("--rounds", type=int, default=5, help="times the engines take turns; prefill takes at most 3")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--depths", nargs="*", type=int, default=[0, 512, 2048], help="tokens in the cache")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16], help="sequences decoded together")
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512, 2048], help="tokens of a prefill")
    parser.add_argument("--matmuls", nargs="*", default=["4096x11008", "2048x5632"], help="in x out")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 16, 128, 512], help="of a matmul's activations")
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PYTHON",
        help=f"the Python that runs one of {', '.join(PACKAGES)}, if not this one",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="where the models are written for the run, if not with other files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_peers"))
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**_QUICK)
    arguments = parser.parse_args()
    arguments.python = dict(_pair(parser, "--python", text) for text in arguments.python)
    arguments.variant = {
        name: json.loads(text) for name, text in (_pair(parser, "--variant", t) for t in arguments.variant)
    }
    if not arguments.python.keys() <= set(PACKAGES):
        parser.error(f"--python takes one of {', '.join(PACKAGES)}")
    return arguments


def _pair(parser: argparse.ArgumentParser, option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        parser.error(f"{option} takes NAME=VALUE, not {text!r}")
    return name, value


class Bench:
    """The workers of a run and what they found; `results` is written after every part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results: dict[str, Any] = {
            "command": _command(),
            "shape": arguments.shape,
            "machine": machine.describe(),
            "versions": {},
            "left_out": [],
            "engines": {},
            "decode": [],
            "prefill": [],
            "matmul": [],
        }
        self._workers: list[Worker] = []
        self._probe: Worker | None = None

    # ---- workers -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for worker in list(self._workers):
            self._end(worker)

    def start_probe(self) -> None:
        size = max(_LEAST_PROBE, _PROBE_CACHES * machine.last_level_cache())
        self._probe = self._start("the probe of the read bandwidth", "autoq", "bandwidth", "Bandwidth")
        if self._probe is not None:
            self._probe.call("load", size=size)
            self.results["probe_bytes"] = size

    def _start(self, name: str, package: str, module: str, cls: str) -> Worker | None:
        """A worker, or None if what it needs is not there."""
        try:
            worker = Worker(self.arguments.python.get(package, sys.executable), module, cls)
        except WorkerError as error:
            self._leave_out(name, error)
            return None
        self._workers.append(worker)
        self.results["versions"] |= worker.versions
        return worker

    def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.close()

    def _leave_out(self, name: str, reason: object) -> None:
        self.results["left_out"].append(f"{name}: {reason}")
        _say(f"left out: {name}: {reason}")

    def _save(self) -> None:
        if self.arguments.output is not None:
            report.write(self.results, self.arguments.output)

    # ---- whole models ------------------------------------------------------------------------------------------------

    def measure_models(self, folder: Path) -> None:
        engines = self._engines()
        available = self._files(folder, {engine.file for engine, _ in engines.values()})
        engines = {name: found for name, found in engines.items() if found[0].file in available}
        workers = self._load(engines, folder)
        for threads in self.arguments.threads:
            for batch in self.arguments.batches:
                for depth in self.arguments.depths:
                    self._decode(workers, threads, batch, depth)
            self._save()
            for tokens in self.arguments.prompts:
                self._prefill(workers, threads, tokens)
            self._save()
        for name, worker in workers.items():
            self.results["engines"][name]["peak_memory"] = worker.call("memory")
            self._end(worker)
        self._save()

    def _engines(self) -> dict[str, tuple[Engine, dict[str, Any]]]:
        """The engines by name, with their options."""
        engines: dict[str, tuple[Engine, dict[str, Any]]] = {}
        for name in self.arguments.engines:
            engines[name] = ENGINES[name], {}
            if name == "autoq":
                variants = self.arguments.variant.items()
                engines |= {f"autoq {variant}": (ENGINES[name], options) for variant, options in variants}
        return engines

    def _files(self, folder: Path, wanted: set[str]) -> set[str]:
        """Writes the files the engines load; returns those that could be written."""
        prepare = self._start("whole models", "autoq", "prepare", "Prepare")
        if prepare is None:
            return set()
        for_llamacpp = {file for file in wanted if file.endswith(".gguf")}
        if for_llamacpp and not prepare.call("can_write_gguf"):
            self._leave_out("llama.cpp", "gguf is not installed")
            wanted = wanted - for_llamacpp
        references = {engine.reference for engine in ENGINES.values() if engine.file in wanted}
        self._weight_bytes: dict[str, int] = {}
        for kind in sorted(references):
            _say(f"writing the model, {kind}")
            shape = {"shape": self.arguments.shape, "layers": self.arguments.layers}
            self._cache_bytes = prepare.call("model", **shape, folder=str(folder), kind=kind)["cache_bytes"]
        if for_llamacpp & wanted and not self._llamacpp_files(prepare, folder, for_llamacpp):
            wanted = wanted - for_llamacpp
        self._end(prepare)
        return wanted

    def _llamacpp_files(self, prepare: Worker, folder: Path, wanted: set[str]) -> bool:
        """Makes llama.cpp's usual files of those with the same blocks, which are checked and deleted."""
        llamacpp = self._start("llama.cpp", "llama.cpp", "llamacpp", "LlamaCpp")
        if llamacpp is None:
            return False
        for engine in ENGINES.values():
            if engine.file not in wanted:
                continue
            source, target = folder / f"{engine.reference}.gguf", folder / engine.file
            same = None
            if engine.reference != "bf16":
                same = str(source)
                llamacpp.call("load", path=same)
                found = llamacpp.call("correlation", reference=str(source.with_suffix(".npz")))
                llamacpp.call("close")
                _say(f"llama.cpp's logits, {target.stem} blocks, correlate with the reference: {found:.5f}")
                if found < _SAME_MODEL:
                    raise SystemExit(f"llama.cpp computes another model from {target.stem} blocks: {found:.5f}")
            llamacpp.call("quantize", source=str(source), target=str(target), kind=target.stem)
            self._weight_bytes[engine.file] = prepare.call("gguf", path=str(target), same_as=same)
            source.unlink()
        self._end(llamacpp)
        return True

    def _load(self, engines: dict[str, tuple[Engine, dict[str, Any]]], folder: Path) -> dict[str, Worker]:
        """Workers with their models, of the engines that fit the memory together."""
        sizes = {name: _size(folder / engine.file) for name, (engine, _) in engines.items()}
        available = machine.available_memory()
        while available is not None and sum(sizes.values()) > 0.8 * available:
            largest = max(sizes, key=lambda name: sizes[name])
            self._leave_out(largest, f"the models need more than the {available / 1e9:.0f} GB of memory there are")
            del sizes[largest]
        workers = {}
        for name in sizes:
            engine, options = engines[name]
            worker = self._start(name, engine.package, engine.module, engine.cls)
            if worker is None:
                continue
            loaded = worker.call("load", path=str(folder / engine.file), **options)
            reference = str(folder / f"{engine.reference}.npz")
            self.results["engines"][name] = {
                "file_bytes": sizes[name],
                "weight_bytes": loaded["weight_bytes"] or self._weight_bytes[engine.file],
                "loading_peak_memory": loaded["peak_memory"],
                "correlation": worker.call("correlation", reference=reference),
            }
            workers[name] = worker
        return workers

    def _decode(self, workers: dict[str, Worker], threads: int, batch: int, depth: int) -> None:
        steps = self.arguments.steps
        cache = batch * depth * self._cache_bytes
        available = machine.available_memory()
        if available is not None and len(workers) * cache > 0.8 * available:
            self._leave_out(f"batch {batch} at depth {depth}", "the caches do not fit the memory")
            return
        _say(f"decode: {threads} threads, batch {batch}, depth {depth}")
        for worker in workers.values():
            worker.call("release")
        for worker in workers.values():
            worker.call("prepare", batch=batch, depth=depth, steps=steps, threads=threads)
        found, limits = self._rounds(
            workers,
            threads,
            self.arguments.rounds,
            lambda name: statistics.median(workers[name].call("decode", steps=steps)),
        )
        read = batch * (depth + steps / 2) * self._cache_bytes
        case = {"threads": threads, "batch": batch, "depth": depth, "limit": limits}
        for name, milliseconds in found.items():
            weights = self.results["engines"][name]["weight_bytes"]
            self.results["decode"].append(
                case | {"engine": name, "milliseconds": milliseconds, "bytes": weights + read, "tokens": batch}
            )

    def _prefill(self, workers: dict[str, Worker], threads: int, tokens: int) -> None:
        _say(f"prefill: {threads} threads, {tokens} tokens")
        for worker in workers.values():
            worker.call("release")
            worker.call("prefill", tokens=min(tokens, 64), threads=threads)
        found, limits = self._rounds(
            workers,
            threads,
            min(self.arguments.rounds, 3),
            lambda name: workers[name].call("prefill", tokens=tokens, threads=threads),
        )
        case = {"threads": threads, "prompt": tokens, "limit": limits, "tokens": tokens}
        for name, milliseconds in found.items():
            written = self.results["engines"][name]["weight_bytes"] + tokens * self._cache_bytes
            self.results["prefill"].append(case | {"engine": name, "milliseconds": milliseconds, "bytes": written})

    def _rounds(
        self, names: Iterable[str], threads: int, rounds: int, measure: Callable[[str], float]
    ) -> tuple[dict[str, list[float]], list[float]]:
        """What each measured in every round, and the probe's limit then; each round starts with another."""
        order = list(names)
        found: dict[str, list[float]] = {name: [] for name in order}
        limits = []
        for i in range(rounds):
            if self._probe is not None:
                limits.append(self._probe.call("measure", threads=threads))
            start = i % max(len(order), 1)
            for name in order[start:] + order[:start]:
                found[name].append(measure(name))
        return found, limits

    # ---- one matmul --------------------------------------------------------------------------------------------------

    def measure_matmuls(self, folder: Path) -> None:
        prepare = self._start("matmuls", "autoq", "prepare", "Prepare") if self.arguments.matmuls else None
        if prepare is None:
            return
        workers = {}
        for package, (module, cls) in MATMULS.items():
            worker = self._start(f"matmuls of {package}", package, module, cls)
            if worker is not None:
                workers[package] = worker
        for shape in self.arguments.matmuls:
            in_features, out_features = (int(size) for size in shape.split("x"))
            sizes = {"in_features": in_features, "out_features": out_features, "rows": max(self.arguments.rows)}
            prepare.call("weight", **sizes, folder=str(folder))
            kernels = self._load_matmuls(workers, folder)
            for threads in self.arguments.threads:
                for rows in self.arguments.rows:
                    self._matmul(kernels, shape, rows, threads)
            self._save()

    def _load_matmuls(self, workers: dict[str, Worker], folder: Path) -> dict[str, tuple[Worker, int]]:
        """The worker of each kernel, and the bytes of its weight."""
        cache = 0 if self.arguments.quick else _MATMUL_CACHES * machine.last_level_cache()
        kernels = {}
        for worker in workers.values():
            found = worker.call("load", folder=str(folder), cache_bytes=cache)
            kernels |= {name: (worker, size) for name, size in found.items()}
        return kernels

    def _matmul(self, kernels: dict[str, tuple[Worker, int]], shape: str, rows: int, threads: int) -> None:
        _say(f"matmul: {threads} threads, {shape}, {rows} rows")
        found, limits = self._rounds(
            kernels,
            threads,
            self.arguments.rounds,
            lambda name: kernels[name][0].call("measure", kernel=name, rows=rows, threads=threads) / 1000,
        )
        case = {"threads": threads, "shape": shape, "rows": rows, "limit": limits, "tokens": rows}
        for name, (worker, size) in kernels.items():
            ask = {"kernel": name, "rows": rows, "threads": threads}
            errors = {x: worker.call("error", **ask, activations=x) for x in ("gaussian", "outliers")}
            self.results["matmul"].append(
                case | {"engine": name, "milliseconds": found[name], "bytes": size, "errors": errors}
            )


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _command() -> str:
    """The command line without paths, which mean nothing elsewhere."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--work", "--output"):
            words.append(f"{word.partition('=')[0]}=PYTHON" if words[-1:] == ["--python"] else word)
        skip = word in ("--work", "--output")
    return shlex.join(["python", "benchmarks/cpu_peers.py", *words])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
