"""Times every plan of the GPU kernels behind `linear` beside the one they choose themselves.

    python benchmarks/tune_linear.py [--model llama-3-8b ...] [--rows 1 4 8 16 32 64] [--output PATH]

For each size and number of rows: the time of the operator, the five fastest plans, and what they are, as in
csrc/cuda/linear.h: row tiles x warps across x slices, blocks for each multiprocessor, w for whole tiles, g for
warpgroups. What is learnt goes into `plan_linear` (csrc/cuda/linear.cu). Times are taken as in gpu_kernels.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_kernels import BITS, MODELS, copies_for, random_weight, sizes_of, take_turns
from machine import device_name

from autoq import ops
from autoq.packed import PackedWeight


class Plan(NamedTuple):
    row_tiles: int
    warps_across: int
    slices: int
    blocks: int
    whole_tiles: bool
    warpgroups: bool


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama-3-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON of all times")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch; run this on a machine with a GPU"
    print(device_name(torch.device("cuda")))
    found = []
    with torch.inference_mode():
        for (in_features, out_features), rows in itertools.product(sizes_of(arguments.model), arguments.rows):
            record = _measure(in_features, out_features, rows, arguments.rounds)
            found.append(record)
            best = ", ".join(f"{plan} {time:.1f}" for plan, time in list(record["plans"].items())[:5])
            print(f"{in_features} x {out_features}, {rows} rows: {record['operator']:.1f} us; {best}", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    return None


def _plans(rows: int) -> Iterator[Plan]:
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    needed = -(-rows // 8)
    for row_tiles, across, slices, each, whole in itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3), (False, True)
    ):
        threads = across * slices * 32
        if row_tiles < 2 * needed and 64 <= threads <= (512 if row_tiles == 1 else 256):
            yield Plan(row_tiles, across, slices, each * multiprocessors, whole, False)
    if needed > 2 and torch.cuda.get_device_capability() == (9, 0):
        for each, whole in itertools.product((1, 2), (False, True)):
            yield Plan(8, 4, 1, each * multiprocessors, whole, True)


def _measure(in_features: int, out_features: int, rows: int, rounds: int) -> dict[str, Any]:
    first = random_weight(in_features, out_features)
    copies = copies_for(sum(tensor.nbytes for tensor in first))
    packed = [first] + [PackedWeight(*(tensor.clone() for tensor in first)) for _ in range(copies - 1)]
    input = torch.randn(rows, in_features, device="cuda").half()
    expected = ops.linear(input, first, None, BITS, out_features)
    operator = take_turns({"": lambda copy: ops.linear(input, packed[copy], None, BITS, out_features)}, copies, rounds)
    times = {}
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for plan in _plans(rows):

        def run(copy: int, plan: Plan = plan) -> torch.Tensor:
            return torch.ops.autoq.linear_with_plan(input, *packed[copy], BITS, out_features, *plan)

        try:
            result = run(0)
        except RuntimeError:  # more shared memory than there is
            continue
        assert (result - expected).norm() <= 1e-3 * expected.norm(), plan
        name = f"{plan.row_tiles}x{plan.warps_across}x{plan.slices}, {plan.blocks // multiprocessors}"
        times[name + "w" * plan.whole_tiles + "g" * plan.warpgroups] = 1e6 * take_turns({"": run}, copies, rounds)[""]
    return {
        "in_features": in_features,
        "out_features": out_features,
        "rows": rows,
        "operator": 1e6 * operator[""],
        "plans": dict(sorted(times.items(), key=lambda item: item[1])),
    }


if __name__ == "__main__":
    sys.exit(main())
