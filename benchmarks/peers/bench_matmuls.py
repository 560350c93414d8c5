"""Single matmuls with a quantized weight."""

from __future__ import annotations

from pathlib import Path

from peers import machine
from peers.bench import Bench, say
from peers.worker import Worker

# How many times the copies of a weight exceed the last-level cache.
_CACHES = 2

_WORKERS = {
    "autoq": ("matmul_torch", "TorchMatmul"),
    "onnxruntime": ("matmul_onnx", "OnnxMatmul"),
    "llama.cpp": ("matmul_ggml", "GgmlMatmul"),
}


class MatmulBench:
    """What is measured with single matmuls, and added to the results of a run."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._arguments = bench, bench.arguments

    def measure(self, folder: Path) -> None:
        prepare = self._bench.prepare()
        if prepare is None:
            return
        workers = {}
        for package, (module, cls) in _WORKERS.items():
            worker = self._bench.start(f"matmuls of {package}", package, module, cls)
            if worker is not None:
                workers[package] = worker
        for shape in self._arguments.matmuls:
            in_features, out_features = (int(size) for size in shape.split("x"))
            sizes = {"in_features": in_features, "out_features": out_features, "rows": max(self._arguments.rows)}
            prepare.call("weight", **sizes, folder=str(folder))
            kernels = self._load(workers, folder)
            for threads in self._arguments.threads:
                for rows in self._arguments.rows:
                    self._matmul(kernels, shape, rows, threads)
            self._bench.save()

    def _load(self, workers: dict[str, Worker], folder: Path) -> dict[str, tuple[Worker, int]]:
        """The worker of each kernel, and the bytes of its weight."""
        cache = 0 if self._arguments.quick else _CACHES * machine.last_level_cache()
        kernels: dict[str, tuple[Worker, int]] = {}
        for worker in workers.values():
            found = worker.call("load", folder=str(folder), cache_bytes=cache)
            kernels |= {name: (worker, size) for name, size in found.items()}
        return kernels

    def _matmul(self, kernels: dict[str, tuple[Worker, int]], shape: str, rows: int, threads: int) -> None:
        say(f"matmul: {threads} threads, {shape}, {rows} rows")
        found = self._bench.rounds(
            kernels,
            threads,
            self._arguments.rounds,
            lambda name: kernels[name][0].call("measure", kernel=name, rows=rows, threads=threads) / 1000,
        )
        case = {"threads": threads, "shape": shape, "rows": rows, "tokens": rows}
        for name, measured in found.items():
            worker, size = kernels[name]
            ask = {"kernel": name, "rows": rows, "threads": threads}
            errors = {x: worker.call("error", **ask, activations=x) for x in ("gaussian", "outliers")}
            self._bench.results["matmul"].append(case | measured | {"engine": name, "bytes": size, "errors": errors})
