"""Whether a long generation stays as fast and as small as it begins.

    python benchmarks/long_generation.py [--shape tinyllama-1.1b | --model DIR] [--tokens 512] [--window 64]

Generates with `generate`, greedily, after a short prompt, once to warm up and then in several rounds. Of every window
of tokens: the median time of one token in all rounds, and the resident memory of the process at its end, the most of
all rounds, beside the bytes that the keys and values of all tokens so far take. Writes Markdown and JSON to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from machine import device_name
from shapes import SHAPES, random_model, round_to_nearest
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from writing import write_results

from autoq import AutoQForCausalLM, QuantConfig, __version__


class Clock(BaseStreamer):
    """Notes when each token comes, and the memory at the end of each window."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._process = psutil.Process()
        self.times: list[float] = []
        self.memory: list[int] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1 and (len(self.times) - 1) % self._window == 0:  # the prompt comes first
            self.memory.append(self._process.memory_info().rss)

    def steps(self) -> list[float]:
        """Milliseconds between one generated token and the next."""
        return [1000 * (after - before) for before, after in zip(self.times[1:], self.times[2:], strict=False)]

    def end(self) -> None:
        """Nothing: all tokens have come."""


def main() -> None:
    arguments = _arguments()
    if arguments.model is None:
        model = round_to_nearest(random_model(arguments.shape, torch.bfloat16), QuantConfig()).model
    else:
        model = AutoQForCausalLM.from_quantized(arguments.model, device_map="cpu", torch_dtype=torch.bfloat16).model
    _generate(model, arguments.tokens, arguments.window)
    clocks = [_generate(model, arguments.tokens, arguments.window) for _ in range(arguments.rounds)]
    windows = [
        {
            "tokens": (i + 1) * arguments.window,
            "ms": statistics.median(
                step for clock in clocks for step in clock.steps()[i * arguments.window : (i + 1) * arguments.window]
            ),
            "resident_bytes": max(clock.memory[i] for clock in clocks),
            "cache_bytes": (i + 1) * arguments.window * _bytes_per_token(model),
        }
        for i in range(arguments.tokens // arguments.window)
    ]
    table = _table(windows)
    print(table)
    name = arguments.shape if arguments.model is None else arguments.model.name
    text = (
        f"`python benchmarks/long_generation.py --rounds {arguments.rounds}`, {name}, 4 bits, "
        f"{device_name(torch.device('cpu'))}; autoq {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.\n\n{table}\n"
    )
    write_results(arguments.output, windows, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b", help="with random weights")
    parser.add_argument("--model", type=Path, help="a quantized checkpoint instead")
    parser.add_argument("--tokens", type=int, default=512, help="to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=64, help="tokens of a line of the table")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_generation"))
    arguments = parser.parse_args()
    if arguments.window < 2 or arguments.tokens < arguments.window:
        parser.error("a window has at least two tokens, and there has to be one")
    return arguments


@torch.no_grad()
def _generate(model: PreTrainedModel, tokens: int, window: int) -> Clock:
    prompt = torch.arange(1, 9)[None]
    clock = Clock(window)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), streamer=clock, do_sample=False, pad_token_id=0,
        max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip
    return clock


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Of keys and values."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def _table(windows: list[dict[str, Any]]) -> str:
    lines = ["| tokens | ms per token | resident, MB | of it keys and values, MB |", "|---|---|---|---|"]
    for window in windows:
        resident, cache = (window[name] / 1e6 for name in ("resident_bytes", "cache_bytes"))
        lines.append(f"| {window['tokens']} | {window['ms']:.2f} | {resident:.0f} | {cache:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
