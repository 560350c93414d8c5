"""The operator `linear` against torch's bf16 linear on the dense weight.

    python benchmarks/linear_kernels.py [--shape 2048x5632 ...] [--rows 1 16 128 ...] [--bits 4] [--capability avx512]

A shape is columns x outputs. Input, output and the dense weight are bf16, groups have 128 columns. All take turns,
round by round, since a machine's speed drifts, and medians are compared. Errors are relative, in the Frobenius norm,
against float64 on the quantized weight. With one row, where reading the weight is the limit, the bandwidth is given
too, beside that of summing a large tensor in the same rounds. Writes Markdown and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import device_name
from torch import Tensor
from torch.nn import functional
from writing import write_results

from autoq import _C, __version__, ops
from autoq.packed import pack
from autoq.quantization.weight import dequantize, quantize

GROUP_SIZE = 128
PROBE_BYTES = 2**29  # more than any cache holds


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.capability is not None:
        _C.set_cpu_capability(arguments.capability)
    probe = torch.ones(PROBE_BYTES // 4)
    rows = []
    with torch.inference_mode():
        for shape in arguments.shape:
            in_features, out_features = (int(size) for size in shape.split("x"))
            rows += _measure_shape(in_features, out_features, probe, arguments)
    table = _table(rows)
    print(table)
    write_results(arguments.output, rows, f"{table}\n\n{_footnote(arguments)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["2048x2048", "2048x5632", "5632x2048", "4096x11008", "11008x4096"]
    parser.add_argument("--shape", nargs="+", default=shapes, help="columns x outputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 64, 128, 512, 2048])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="times that all take turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--capability", choices=_C.cpu_capabilities(), help="kernels other than the best")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels"))
    return parser.parse_args()


def _measure_shape(
    in_features: int, out_features: int, probe: Tensor, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(out_features, in_features, generator=generator), arguments.bits, GROUP_SIZE)
    packed, dense = pack(weight), dequantize(weight, torch.float32).bfloat16()
    weight_bytes = sum(tensor.nbytes for tensor in packed)
    found = []
    for rows in arguments.rows:
        input = torch.randn(rows, in_features, generator=generator).bfloat16()
        runs: dict[str, Callable[[], Tensor]] = {"torch": lambda: functional.linear(input, dense)}  # noqa: B023
        for mode in ops.MODES:
            runs[mode] = lambda mode=mode: ops.linear(input, packed, None, arguments.bits, out_features, mode)  # noqa: B023
        sample = input[-16:]  # the reference takes long
        expected = sample.double() @ dequantize(weight, torch.float64).T
        errors = {name: _error(run()[-16:], expected) for name, run in runs.items()}
        if rows == 1:
            runs["read"] = probe.sum
        seconds = _take_turns(runs, arguments.rounds)
        row = {
            "shape": f"{in_features}x{out_features}",
            "rows": rows,
            "bits": arguments.bits,
            "microseconds": {name: 1e6 * time for name, time in seconds.items() if name != "read"},
            "gops": {
                name: 2e-9 * rows * in_features * out_features / time
                for name, time in seconds.items()
                if name != "read"
            },
            "errors": errors,
        }
        if rows == 1:
            row["gigabytes_per_second"] = {
                "torch": dense.nbytes / seconds["torch"] / 1e9,
                "exact": weight_bytes / seconds["exact"] / 1e9,
                "read": probe.nbytes / seconds["read"] / 1e9,
            }
        found.append(row)
    return found


def _take_turns(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """The median time of each; every run of a round is as long as a few milliseconds of calls."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(0.005 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(found) for name, found in times.items()}


def _error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| Columns x outputs | Rows | torch bf16 (us) | exact (us) | int8 (us) | exact / torch | int8 / torch "
        "| exact GOP/s | int8 GOP/s | error of torch | error of exact | error of int8 | GB/s exact / read |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        times = row["microseconds"]
        cells = [row["shape"], str(row["rows"])]
        cells += [f"{times[name]:.0f}" for name in ("torch", "exact", "int8")]
        cells += [f"{times['torch'] / times[name]:.2f}x" for name in ops.MODES]
        cells += [f"{row['gops'][name]:.0f}" for name in ops.MODES]
        cells += [f"{row['errors'][name]:.1e}" for name in ("torch", "exact", "int8")]
        speed = row.get("gigabytes_per_second")
        cells.append(f"{speed['exact']:.1f} / {speed['read']:.1f}" if speed else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _footnote(arguments: argparse.Namespace) -> str:
    return (
        f"`python benchmarks/linear_kernels.py`; {arguments.bits} bits, groups of {GROUP_SIZE}, kernels for "
        f"{_C.cpu_capability()}. {device_name(torch.device('cpu'))}; autoq {__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}. Up to 8 rows (16 with AMX), the modes are the same."
    )


if __name__ == "__main__":
    main()
