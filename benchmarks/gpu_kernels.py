"""The operator `linear` on a GPU against cuBLAS and torch's own int4 kernel, as shares of what the memory can do.

    python benchmarks/gpu_kernels.py [--model llama-2-7b ...] [--rows 1 16 ...] [--output PATH]

Weights are random and have 4 bits in groups of 128. Each is there several times, so that together they are more than
twice what the second-level cache holds, and the calls of a CUDA graph go over them in turn: what is timed reads every
weight from memory and waits for no launch. The contenders take turns, round by round, and medians are compared. Beside
them stands a copy from device memory to device memory in the same run, counted in bytes read and written: the limit
for few rows. Errors are relative, in the Frobenius norm, against float64 on the dequantized weight, over 16 rows and
4096 outputs.

    autoq         ops.linear, fp16
    warpgroups    the same on Hopper's kernel for many rows, which ops.linear does not choose yet (with --warpgroups)
    dequantize    the weight made dense in fp16, then cuBLAS: what autoq does for many rows
    cuBLAS        fp16 on a dense weight
    int4pack      torch's _weight_int4pack_mm, bf16
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import device_name
from torch import Tensor
from torch.nn import functional
from writing import write_results

from autoq import __version__, ops
from autoq.packed import PackedWeight

GROUP_SIZE = 128
BITS = 4

# Linears as they run, with q/k/v and gate/up in one: name, input features, output features.
MODELS = {
    "tiny": [("qkv", 256, 384), ("down", 512, 256)],  # to try the script
    "llama-2-7b": [("qkv", 4096, 12288), ("o", 4096, 4096), ("gate_up", 4096, 22016), ("down", 11008, 4096)],
    "llama-3-8b": [("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096)],
    "llama-3-70b": [("qkv", 8192, 10240), ("o", 8192, 8192), ("gate_up", 8192, 57344), ("down", 28672, 8192)],
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
COPY_BYTES = 2**30
_LAUNCH_CYCLES = 200_000
DENSE_FROM = 32  # rows from which "dequantize" is measured
WARPGROUP_ROWS = range(17, 513)  # rows for which "warpgroups" is

Run = Callable[[int], Tensor]  # given the index of the weight's copy


def main() -> str | None:
    arguments = _arguments()
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    bandwidth = copy_bandwidth(arguments.rounds)
    records: list[dict[str, Any]] = []
    with torch.inference_mode():
        for in_features, out_features in sizes_of(arguments.model):
            for record in _measure_size(in_features, out_features, arguments):
                records.append(record)
                _write(arguments.output, bandwidth, records)  # now, since the run may be cut off
        # The GPU may have been slow at first.
        _write(arguments.output, max(bandwidth, copy_bandwidth(arguments.rounds)), records)
    print(arguments.output.with_suffix(".md").read_text())
    return None


def _write(output: Path, bandwidth: float, records: list[dict[str, Any]]) -> None:
    result = {
        "device": device_name(torch.device("cuda")),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "versions": {"autoq": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "records": records,
    }
    write_results(output, result, _report(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--warpgroups", action="store_true", help="measure the kernel for warpgroups too")
    parser.add_argument("--rounds", type=int, default=7, help="times that all take turns")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels-gpu"))
    return parser.parse_args()


def sizes_of(models: list[str]) -> list[tuple[int, int]]:
    """The different sizes of the models' linears, smallest first."""
    sizes = {(columns, outputs) for model in models for _, columns, outputs in MODELS[model]}
    return sorted(sizes, key=lambda size: size[0] * size[1])


# ---- time ------------------------------------------------------------------------------------------------------------


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written per second by a copy from device memory to device memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    for _ in range(500):  # until the clocks are up: half a second
        target.copy_(source)
    seconds = take_turns({"copy": lambda _: target.copy_(source)}, 1, rounds)["copy"]
    return 2 * COPY_BYTES / seconds


def take_turns(runs: dict[str, Run], copies: int, rounds: int) -> dict[str, float]:
    """Median seconds of one call of each; a round of each is a graph of calls that go over the copies."""
    graphs, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        graphs[name] = _capture(run, copies)
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(_seconds(graph.replay) / copies)
    return {name: statistics.median(found) for name, found in times.items()}


def _capture(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)  # modules are loaded and handles made before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            run(copy)
    graph.replay()
    return graph


def _seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_LAUNCH_CYCLES)  # until all is in the queue: launching a graph takes as long as a small kernel
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


# ---- what is measured ------------------------------------------------------------------------------------------------


def copies_for(weight_bytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(4, -(-2 * cache // weight_bytes) + 1)


def random_weight(in_features: int, out_features: int) -> PackedWeight:
    """Random words are random codes, in whatever order."""
    blocks, units, groups = -(-out_features // 16), -(-in_features // 32), in_features // GROUP_SIZE
    words = torch.randint(-(2**31), 2**31, (blocks, units, BITS, 16), dtype=torch.int32, device="cuda")
    scales = (torch.rand(blocks, groups, 16, device="cuda") * 0.01 + 0.001).half()
    zeros = torch.randint(0, 2**BITS, (blocks, groups, 16), dtype=torch.uint8, device="cuda")
    return PackedWeight(words, scales, zeros)


def warpgroup_linear(input: Tensor, packed: PackedWeight, out_features: int) -> Tensor:
    """`ops.linear` with the plan for warpgroups (csrc/cuda/linear.h), two blocks for each multiprocessor."""
    blocks = 2 * torch.cuda.get_device_properties(input.device).multi_processor_count
    return torch.ops.autoq.linear_with_plan(input, *packed, BITS, out_features, 8, 4, 1, blocks, False, True)


def _int4pack(in_features: int, out_features: int, copies: int) -> Callable[[Tensor, int], Tensor] | None:
    """torch's own kernel on random weights; None where this torch has none for the size."""
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device="cuda")
    try:
        packed = torch._convert_weight_to_int4pack(codes, 8)
    except (AttributeError, RuntimeError) as error:
        print(f"int4pack is left out for {in_features} x {out_features}: {error}", file=sys.stderr)
        return None
    parameters = torch.rand(in_features // GROUP_SIZE, out_features, 2, device="cuda").bfloat16()
    weights = [(packed.clone(), parameters.clone()) for _ in range(copies)]
    return lambda input, copy: torch._weight_int4pack_mm(input, weights[copy][0], GROUP_SIZE, weights[copy][1])


def _measure_size(in_features: int, out_features: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    first = random_weight(in_features, out_features)
    weight_bytes = sum(tensor.nbytes for tensor in first)
    copies = copies_for(weight_bytes)
    packed = [first] + [PackedWeight(*(tensor.clone() for tensor in first)) for _ in range(copies - 1)]
    dense_copies = min(copies, copies_for(2 * in_features * out_features))
    dense = ops.dequantize(first, BITS, out_features, in_features, torch.float16)
    dense = [dense] + [dense.clone() for _ in range(dense_copies - 1)]
    int4pack = _int4pack(in_features, out_features, copies)
    for rows in arguments.rows:
        input = torch.randn(rows, in_features, device="cuda").half()
        brain_input = input.bfloat16()

        def autoq(copy: int, input: Tensor = input) -> Tensor:
            return ops.linear(input, packed[copy], None, BITS, out_features)

        def cublas(copy: int, input: Tensor = input) -> Tensor:
            return functional.linear(input, dense[copy % dense_copies])

        def dequantize(copy: int, input: Tensor = input) -> Tensor:
            weight = ops.dequantize(packed[copy], BITS, out_features, in_features, torch.float16)
            return functional.linear(input, weight)

        runs: dict[str, Run] = {"autoq": autoq, "cuBLAS": cublas}
        if rows >= DENSE_FROM:
            runs["dequantize"] = dequantize
        if arguments.warpgroups and rows in WARPGROUP_ROWS and torch.cuda.get_device_capability() == (9, 0):
            runs["warpgroups"] = lambda copy, input=input: warpgroup_linear(input, packed[copy], out_features)
        if int4pack is not None:
            runs["int4pack"] = lambda copy, input=brain_input: int4pack(input, copy)
        moved = weight_bytes + 2 * rows * (in_features + out_features)
        # Where a call takes long, a few of them are enough.
        calls = copies if rows < 1024 else min(copies, 4)
        seconds = take_turns(runs, calls, arguments.rounds)
        yield {
            "in_features": in_features,
            "out_features": out_features,
            "rows": rows,
            "microseconds": {name: 1e6 * time for name, time in seconds.items()},
            "bytes": moved,
            "errors": _errors(input, first, dense[0], out_features),
        }


def _errors(input: Tensor, packed: PackedWeight, dense: Tensor, out_features: int) -> dict[str, float]:
    sample, outputs = slice(-16, None), min(out_features, 4096)
    part = PackedWeight(*(tensor[: -(-outputs // 16)] for tensor in packed))
    exact = ops.dequantize(part, BITS, outputs, input.shape[1], torch.float32).double()
    expected = input[sample].double() @ exact.T
    results = {"autoq": ops.linear(input, packed, None, BITS, out_features), "cuBLAS": functional.linear(input, dense)}
    return {
        name: ((result[sample, :outputs].double() - expected).norm() / expected.norm()).item()
        for name, result in results.items()
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def _report(result: dict[str, Any]) -> str:
    bandwidth = result["copy_gigabytes_per_second"]
    lines = [
        f"Linears of 4 bits, groups of {GROUP_SIZE}, on {result['device']}. A copy moves {bandwidth:.0f} GB/s.",
        "",
        "| Columns x outputs | Rows | autoq (us) | warpgroups (us) | dequantize (us) | cuBLAS (us) | int4pack (us) "
        "| autoq / cuBLAS | autoq / int4pack | GB/s | of the copy | error of autoq | error of cuBLAS |",
        "|---" * 13 + "|",
    ]
    for record in result["records"]:
        times = record["microseconds"]
        speed = record["bytes"] / times["autoq"] / 1e3
        cells = [f"{record['in_features']} x {record['out_features']}", str(record["rows"])]
        cells += [
            f"{times[name]:.1f}" if name in times else "-"
            for name in ("autoq", "warpgroups", "dequantize", "cuBLAS", "int4pack")
        ]
        cells += [f"{times[name] / times['autoq']:.2f}x" if name in times else "-" for name in ("cuBLAS", "int4pack")]
        cells += [f"{speed:.0f}", f"{speed / bandwidth:.0%}"]
        cells += [f"{record['errors'][name]:.1e}" for name in ("autoq", "cuBLAS")]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"`python benchmarks/gpu_kernels.py`; {versions}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
