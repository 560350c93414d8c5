"""Latency of a model in 16 bits and in 4: the table `Model | Device | FP16 | INT4 | Speedup`, and what belongs to it.

    python benchmarks/latency.py [--shape tinyllama-1.1b ...] [--model FULL --quantized DIR [--text FILE]]

A shape is measured with random weights. A real model is given in full precision and quantized; with a text, the
perplexity of both is measured too. Latency is the median time of one decoded token (batch 1, KV cache, through
transformers' forward). The two models take turns, round by round, since a machine's speed drifts. 16 bits are fp16 on
a GPU and bf16 on a CPU, where fp16 arithmetic is rare. Writes Markdown and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import device_name
from shapes import SHAPES, random_model, round_to_nearest
from transformers import AutoTokenizer
from writing import write_results

from autoq import AutoQForCausalLM, QuantConfig, __version__
from autoq.evaluation import measure_generation, model_bytes, perplexity


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    rows = []
    for shape in arguments.shape:
        with device:
            full, quantized = random_model(shape, dtype), round_to_nearest(random_model(shape, dtype), QuantConfig())
        rows.append(_measure(shape, full, quantized, device, arguments))
    if arguments.model is not None:
        rows.append(_measure_checkpoints(arguments, device, dtype))
    table = _table(rows)
    print(table)
    write_results(arguments.output, rows, f"{table}\n\n{_footnote(rows)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=sorted(SHAPES), default=[], help="shapes with random weights")
    parser.add_argument("--model", type=Path, help="a full-precision model")
    parser.add_argument("--quantized", type=Path, help="the same model, quantized")
    parser.add_argument("--text", type=Path, help="text for the perplexity of both")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated in each round")
    parser.add_argument("--rounds", type=int, default=5, help="times the models take turns")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latency"))
    arguments = parser.parse_args()
    if not arguments.shape and arguments.model is None:
        arguments.shape = ["tinyllama-1.1b"]
    if (arguments.model is None) != (arguments.quantized is None):
        parser.error("--model and --quantized go together")
    return arguments


def _measure_checkpoints(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    full = AutoQForCausalLM.from_pretrained(arguments.model, torch_dtype=dtype)
    quantized = AutoQForCausalLM.from_quantized(arguments.quantized, torch_dtype=dtype, device_map=device)
    row = _measure(arguments.model.name, full, quantized, device, arguments)
    if arguments.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        row["perplexity"] = {
            "16 bits": perplexity(full, tokenizer, arguments.text).value,
            "4 bits": perplexity(quantized, tokenizer, arguments.text).value,
        }
    return row


def _measure(
    name: str, full: Any, quantized: Any, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    models = {"16 bits": full.to(device), "4 bits": quantized.to(device)}
    rounds: dict[str, list[Any]] = {kind: [] for kind in models}
    for _ in range(arguments.rounds):
        for kind, model in models.items():
            rounds[kind].append(measure_generation(model, arguments.prompt, arguments.new_tokens, repeats=1))
    pairs = zip(rounds["16 bits"], rounds["4 bits"], strict=True)
    return {
        "model": name,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": arguments.prompt,
        "decode_ms": {kind: statistics.median(r.decode_milliseconds for r in found) for kind, found in rounds.items()},
        "prefill_ms": {
            kind: 1000 * statistics.median(r.prefill_seconds for r in found) for kind, found in rounds.items()
        },
        "speedups": sorted(one.decode_milliseconds / other.decode_milliseconds for one, other in pairs),
        "bytes": {kind: model_bytes(model) for kind, model in models.items()},
        "versions": {
            "autoq": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| Model | Device | FP16 latency (ms) | INT4 latency (ms) | Speedup | FP16 prefill (ms) | INT4 prefill (ms) "
        "| FP16 memory (GB) | INT4 memory (GB) | FP16 perplexity | INT4 perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        quality = row.get("perplexity", {})
        cells = [row["model"], row["device"]]
        cells += [f"{row['decode_ms'][kind]:.1f}" for kind in ("16 bits", "4 bits")]
        cells += [f"{statistics.median(row['speedups']):.2f}x"]
        cells += [f"{row['prefill_ms'][kind]:.0f}" for kind in ("16 bits", "4 bits")]
        cells += [f"{row['bytes'][kind] / 1e9:.2f}" for kind in ("16 bits", "4 bits")]
        cells += [f"{quality[kind]:.3f}" if quality else "-" for kind in ("16 bits", "4 bits")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _footnote(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        spread = f"{row['speedups'][0]:.2f}x to {row['speedups'][-1]:.2f}x"
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lines.append(
            f"{row['model']}: prompt of {row['prompt_tokens']} tokens, speedups by round {spread}; {versions}."
        )
    kind = "fp16" if torch.cuda.is_available() else "bf16"
    return f'`python benchmarks/latency.py`; "FP16" is {kind} on this device. ' + " ".join(lines)


if __name__ == "__main__":
    main()
