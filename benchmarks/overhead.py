"""How much of a token's time goes by outside the linears, on a CPU.

    python benchmarks/overhead.py [--shape tinyllama-1.1b] [--threads 2]

Times a greedy step after a few tokens, when attention has next to nothing to read, and, taking turns with it, the same
linears by themselves, one after the other as the step does: those of a block that read the same input in one call.
Since all weights together do not fit the caches, they come from memory in both. What it costs to call an operator from
Python and to wake its threads, which the step does not do for each linear, is measured with a weight that stays in the
caches, and taken off. It is just large enough for all threads, and its product is taken off too: what is left for the
linears is rather too little. Medians over the rounds; writes Markdown and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import device_name
from shapes import SHAPES, random_model, round_to_nearest
from torch import Tensor
from transformers import PreTrainedModel
from writing import write_results

from autoq import QuantConfig, __version__, ops
from autoq.evaluation.speed import greedy_step
from autoq.nn import QuantLinear
from autoq.nn.block import linears_read_together
from autoq.packed import PackedWeight, pack
from autoq.quantization.weight import quantize

_OUTPUTS_EACH = 128  # of 2048 inputs, from which on a thread takes part


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model = round_to_nearest(random_model(arguments.shape, torch.bfloat16), QuantConfig()).model
    linears = _linears(model)
    outputs = _OUTPUTS_EACH * arguments.threads
    little = _call(pack(quantize(torch.randn(outputs, 2048), 4, 128)), 2048, outputs)
    rounds = []
    with torch.inference_mode():
        step = _Steps(model)
        for work in (step, *linears):
            work()
        for _ in range(arguments.rounds):
            whole, own, calls = [], [], []
            for _ in range(arguments.steps):
                whole.append(_seconds([step]))
                own.append(_seconds(linears))
                calls.append(_seconds([little] * len(linears)))
            rounds.append([1000 * statistics.median(times) for times in (whole, own, calls)])
    step_ms, own_ms, call_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    linear_ms = own_ms - call_ms
    result = {
        "shape": arguments.shape, "threads": arguments.threads, "step_ms": step_ms, "linears_ms": linear_ms,
        "calls_ms": call_ms, "outside_share": 1 - linear_ms / step_ms, "rounds": rounds,
    }  # fmt: skip
    options = f"--shape {arguments.shape} --threads {arguments.threads} --rounds {arguments.rounds}"
    text = (
        f"`python benchmarks/overhead.py {options}`, 4 bits, the head bf16, {device_name(torch.device('cpu'))}; "
        f"autoq {__version__}, torch {torch.__version__}, transformers {transformers.__version__}.\n\n"
        "| a step, ms | its linears, ms | outside, ms | share |\n|---|---|---|---|\n"
        f"| {step_ms:.2f} | {linear_ms:.2f} | {step_ms - linear_ms:.2f} | {result['outside_share']:.1%} |"
    )
    print(text)
    write_results(arguments.output, result, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b", help="with random weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of a round")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead"))
    return parser.parse_args()


class _Steps:
    """One more greedy token each time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._ids, self._cache = greedy_step(model, torch.arange(1, 9)[None], None)

    def __call__(self) -> None:
        self._ids, self._cache = greedy_step(self._model, self._ids, self._cache)


def _linears(model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """The products of a step with one row, in their order."""
    together = linears_read_together(model)
    left = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    products = []
    while left:
        first = next(iter(left))
        modules = [left.pop(name) for name in next((names for names in together if first in names), [first])]
        packed = PackedWeight.joined([module.packed() for module in modules])
        products.append(_call(packed, modules[0].in_features, sum(module.out_features for module in modules)))
    head = model.get_output_embeddings().weight
    row = torch.randn(1, head.shape[1], dtype=head.dtype)
    return [*products, lambda: ops.dense_linear(row, head, None)]


def _call(packed: PackedWeight, in_features: int, out_features: int) -> Callable[[], Tensor]:
    row = torch.randn(1, in_features, dtype=torch.bfloat16)
    return lambda: ops.linear(row, packed, None, 4, out_features)


def _seconds(calls: list[Any]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
