"""Decode and prefill of whole models on a GPU: 4 bits here, fp16 with transformers, fp16 compiled.

    python benchmarks/gpu_models.py [--shape llama-3-8b ...] [--batch 1 16 4] [--depth 0 2048] [--seconds 200]

Models are of the shape, with random weights made on the GPU. A decoding step is a forward of one token for every
sequence and the choice of the next, with nothing read back in between; the time of a step is that of many in a row.
Caches are filled with random keys and values up to the depth. "generate" is transformers' own loop, which waits for the
GPU at every token. Prefill is one forward over a prompt of the largest depth.

The limit of a step is what it has to read, the weights and the cache, at the speed of a device-to-device copy in the
same run (bytes read and written). Cases that do not fit the memory or the time are left out, and listed; the first ones
matter most. Writes Markdown and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from machine import device_name
from shapes import SHAPES, random_model, round_to_nearest
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from writing import write_results

from autoq import QuantConfig, __version__
from autoq.extension import extension_missing
from autoq.nn.cache import KVLayer

_STEPS, _WARMUP, _ROUNDS = 24, 4, 3
_ROOM = _WARMUP + _ROUNDS * _STEPS
_COPY_BYTES = 2**30


class Case(NamedTuple):
    kind: str  # "decode", "prefill" or "generate"
    batch: int
    depth: int


class Bench:
    """The results of a run, and the time left for more."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self._end = self._part_end = time.monotonic() + arguments.seconds
        self.records: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def begin(self, parts_left: int) -> None:
        """One of so many parts, which shares the time that is left with the others."""
        now = time.monotonic()
        self._part_end = now + (self._end - now) / parts_left

    def run(
        self, engine: str, shape: str, case: Case, measure: Callable[[], float], bytes_read: int, decoder: Decoder
    ) -> None:
        """Measures a case in milliseconds, or notes why not."""
        name = f"{shape}, {engine}: {case.kind}, batch {case.batch}, depth {case.depth}"
        if time.monotonic() > self._part_end:
            self.left_out.append(f"{name} (time)")
            return
        reset_memory(self.device)
        try:
            milliseconds, recorded = measure(), recorded_steps(decoder.model)
        except Exception as error:  # of memory, or of a compiler: the other cases are worth having
            self.left_out.append(f"{name} ({type(error).__name__})")
            return
        record = {"shape": shape, "engine": engine, **case._asdict(), "milliseconds": milliseconds}
        record |= {"bytes_read": bytes_read, "peak_memory": peak_memory(self.device)}
        record["copy_gigabytes_per_second"] = copy_speed(self.device)
        record["recorded_steps"] = recorded
        self.records.append(record)
        print(f"{name}: {milliseconds:.3f} ms, {recorded} recorded steps", flush=True)
        self.save()  # now, since the run may be cut off

    def save(self) -> None:
        output: Path = self.arguments.output
        results = {"records": self.records, "left_out": self.left_out}
        write_results(output, results, f"{table(self.records)}\n\n{footnote(self)}")


# ---- the device: a CPU does to try the script ------------------------------------------------------------------------


def copy_speed(device: torch.device) -> float:
    """GB/s of a copy on the device, read and written."""
    size = _COPY_BYTES if device.type == "cuda" else _COPY_BYTES // 64
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(timed(lambda: target.copy_(source), 3, device) / 3 for _ in range(5))
    return 2e-6 * size / milliseconds


def timed(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Milliseconds of so many calls, on the device's own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            run()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- engines ---------------------------------------------------------------------------------------------------------


def fill(cache: Any, model: Any, batch: int, depth: int) -> Any:
    config = model.config
    shape = (batch, config.num_key_value_heads, depth, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers if depth else 0):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


class Decoder:
    """A model that decodes greedily, on a cache with random content."""

    def __init__(self, model: Any, own_cache: bool) -> None:
        self.model, self._own_cache = model, own_cache

    def cache(self, batch: int, depth: int) -> Any:
        config = self.model.config
        cache = DynamicCache(config=config)
        if self._own_cache:  # transformers' own layers would be copied to ours
            cache.layers = [KVLayer() for _ in range(config.num_hidden_layers)]
        return fill(cache, self.model, batch, depth)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def decode(self, batch: int, depth: int) -> float:
        cache = self.cache(batch, depth)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.model.device)

        def step() -> None:
            nonlocal ids
            ids = self.forward(ids, cache)[:, -1:].argmax(-1)

        timed(step, _WARMUP, self.model.device)
        return statistics.median(timed(step, _STEPS, self.model.device) / _STEPS for _ in range(_ROUNDS))

    def prefill(self, batch: int, tokens: int) -> float:
        ids = torch.randint(self.model.config.vocab_size, (batch, tokens), device=self.model.device)
        run = lambda: self.forward(ids, self.cache(batch, 0))  # noqa: E731
        run()
        return statistics.median(timed(run, 1, self.model.device) for _ in range(_ROUNDS))

    def generate(self, batch: int, depth: int) -> float:
        """Milliseconds a token, by the difference of two lengths."""
        ids = torch.randint(self.model.config.vocab_size, (batch, max(depth, 1)), device=self.model.device)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

        def seconds(tokens: int) -> float:
            synchronize(self.model.device)
            start = time.perf_counter()
            self.model.generate(ids, max_new_tokens=tokens, **options)
            synchronize(self.model.device)
            return time.perf_counter() - start

        seconds(_WARMUP)
        found = [seconds(_WARMUP + _STEPS) - seconds(_WARMUP) for _ in range(_ROUNDS)]
        return 1000 * statistics.median(found) / _STEPS


class CompiledDecoder(Decoder):
    """fp16 as transformers advises for speed: a static cache, and the step compiled into CUDA graphs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, own_cache=False)
        self._forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def cache(self, batch: int, depth: int) -> Any:
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=-(-(depth + _ROOM) // 64) * 64)
        size = config.hidden_size // config.num_attention_heads
        # Before it is compiled, or its addresses would not be known to be fixed.
        cache.early_initialization(batch, config.num_key_value_heads, size, self.model.dtype, self.model.device)
        return fill(cache, self.model, batch, depth)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.clone()


# ---- cases -----------------------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """What a decoded token reads of the weights: all but the rows of the embeddings it does not need."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values()) - model.get_input_embeddings().weight.nbytes  # type: ignore[operator]


def recorded_steps(model: Any) -> int:
    """How many steps autoq keeps recorded for replay (autoq/nn/steps.py)."""
    return sum(len(slot.recordings) for slot in getattr(model.forward, "_slots", ()))


def cache_bytes(config: Any, batch: int, positions: float) -> int:
    size = config.hidden_size // config.num_attention_heads
    return int(batch * positions * config.num_hidden_layers * 2 * config.num_key_value_heads * size * 2)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """In the order in which they matter."""
    for batch in arguments.batch:
        for depth in arguments.depth:
            yield Case("decode", batch, depth)
        if batch == min(arguments.batch):
            yield Case("generate", batch, min(arguments.depth))
            yield Case("prefill", batch, max(arguments.depth))
    for batch in sorted(set(arguments.batch) - {min(arguments.batch)}):
        yield Case("prefill", batch, max(arguments.depth))


def measure(bench: Bench, shape: str, engine: str, decoder: Decoder, chosen: list[Case]) -> None:
    weights = weight_bytes(decoder.model)
    for case in chosen:
        run = getattr(decoder, case.kind)
        positions = case.depth + _WARMUP + _STEPS * _ROUNDS / 2
        read = 0 if case.kind == "prefill" else weights + cache_bytes(decoder.model.config, case.batch, positions)
        bench.run(engine, shape, case, lambda run=run, case=case: run(case.batch, case.depth), read, decoder)


@torch.no_grad()
def measure_shape(bench: Bench, shape: str) -> None:
    chosen = list(cases(bench.arguments))
    with bench.device:
        quantized = round_to_nearest(random_model(shape, torch.float16), QuantConfig()).model
        measure(bench, shape, "autoq 4 bits", Decoder(quantized, own_cache=True), chosen)
        del quantized
        model = random_model(shape, torch.float16)
    measure(bench, shape, "transformers fp16", Decoder(model, own_cache=False), chosen)


@torch.no_grad()
def measure_compiled(bench: Bench, shape: str) -> None:
    batches = bench.arguments.compile_batch
    compiled = [case for case in cases(bench.arguments) if case.kind == "decode" and case.batch in batches]
    if compiled:
        with bench.device:
            model = random_model(shape, torch.float16)
        measure(bench, shape, "transformers fp16, compiled", CompiledDecoder(model), compiled)
        torch.compiler.reset()


# ---- results ---------------------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| Model | Case | Batch | Depth | Engine | ms | tokens/s | of the limit | against fp16 | peak memory (GB) |",
        "|---" * 10 + "|",
    ]
    fp16 = {
        (r["shape"], r["kind"], r["batch"], r["depth"]): r["milliseconds"]
        for r in records
        if r["engine"] == "transformers fp16"
    }
    for r in sorted(records, key=lambda r: (r["shape"], r["kind"], r["batch"], r["depth"])):
        tokens = r["batch"] * (r["depth"] if r["kind"] == "prefill" else 1)
        limit = r["bytes_read"] / r["copy_gigabytes_per_second"] / 1e6
        baseline = fp16.get((r["shape"], r["kind"], r["batch"], r["depth"]))
        cells = [r["shape"], r["kind"], str(r["batch"]), str(r["depth"]), r["engine"], f"{r['milliseconds']:.2f}"]
        cells += [f"{1000 * tokens / r['milliseconds']:.0f}", f"{limit / r['milliseconds']:.0%}" if limit else "-"]
        cells += [f"{baseline / r['milliseconds']:.2f}x" if baseline else "-", f"{r['peak_memory'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def footnote(bench: Bench) -> str:
    speeds = [r["copy_gigabytes_per_second"] for r in bench.records]
    text = (
        f"`python benchmarks/gpu_models.py` on {device_name(bench.device)}; copies at {min(speeds):.0f} to "
        f"{max(speeds):.0f} GB/s; autoq {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, python {platform.python_version()}. Groups of 128, fp16 head."
    )
    return text + (f"\n\nLeft out: {'; '.join(bench.left_out)}." if bench.left_out else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-3-8b", "llama-2-7b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 4])
    parser.add_argument("--depth", nargs="+", type=int, default=[0, 2048])
    parser.add_argument("--compile-batch", nargs="*", type=int, default=[1], help="compiling takes a minute for each")
    parser.add_argument("--seconds", type=float, default=200, help="no case is begun after these")
    parser.add_argument("--device", default="cuda", help="the CPU, to try the script on a tiny shape")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/models-gpu"))
    return parser.parse_args()


def main() -> str | None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    if extension_missing() is not None:
        return f"autoq's native extension {extension_missing()}"
    bench = Bench(arguments)
    # What compiles comes last: it takes longest.
    parts = [(part, shape) for part in (measure_shape, measure_compiled) for shape in arguments.shape]
    for done, (part, shape) in enumerate(parts):
        bench.begin(len(parts) - done)
        part(bench, shape)
    if not bench.records:
        return "nothing could be measured"
    bench.save()
    print(arguments.output.with_suffix(".md").read_text())
    return None


if __name__ == "__main__":
    sys.exit(main())
