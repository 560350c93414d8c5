"""Time and peak memory of quantizing: autoq beside AutoAWQ, on one model and the same tokens, in one run.

    python benchmarks/quantization_time.py --autoawq PYTHON [--layers 2] [--samples 16] [--length 512]

The model has TinyLlama-1.1B's shape in bf16 with random weights. Both walk the blocks one by one and spend the same on
each, so `--layers` cuts the run short without changing the ratio; what is printed says how many were run. PYTHON is
that of an environment with AutoAWQ (see autoawq_worker.py). Each runs in a process of its own, one after the other;
autoq once more from the disk, within `--max-memory`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import device_name
from shapes import random_model
from writing import write_results

from autoq import AutoQForCausalLM, __version__
from autoq.evaluation.speed import peak_process_bytes


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_autoq(arguments)))
        return
    options = ["--layers", arguments.layers, "--samples", arguments.samples]
    worker = [arguments.autoawq, Path(__file__).with_name("autoawq_worker.py"), "time"]
    own = [sys.executable, __file__, "--worker", *options, "--length", arguments.length]
    with tempfile.TemporaryDirectory() as directory:
        random_model("tinyllama-1.1b", torch.bfloat16, arguments.layers).save_pretrained(directory)
        results = {
            "autoq": _run(own),
            "AutoAWQ": _run([*worker, *options, "--seq-len", arguments.length]),
            f"autoq within {arguments.max_memory}": _run(
                [*own, "--from-disk", directory, "--max-memory", arguments.max_memory]
            ),
        }
    text = _table(results, arguments)
    print(text)
    write_results(arguments.output, results, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoawq", type=Path, help="Python of an environment with AutoAWQ")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model, of TinyLlama's 22")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--max-memory", default="1750MB", help="of the run from the disk")
    parser.add_argument("--from-disk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantization_time"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.autoawq is None and not arguments.worker:
        parser.error("--autoawq is missing: the Python of an environment with AutoAWQ")
    return arguments


def _run(command: list[Any]) -> dict[str, Any]:
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def _autoq(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.from_disk is not None:
        model, limits = AutoQForCausalLM.from_pretrained(arguments.from_disk, device_map="disk"), arguments.max_memory
    else:
        model = AutoQForCausalLM(random_model("tinyllama-1.1b", torch.bfloat16, arguments.layers))
        limits = None
    generator = torch.Generator().manual_seed(0)  # the tokens autoawq_worker.py draws
    tokens = torch.randint(model.config.vocab_size, (arguments.samples, arguments.length), generator=generator)
    before = peak_process_bytes()
    start = time.perf_counter()
    report = model.quantize(
        None,
        {},
        tokens,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=arguments.length,
        max_memory=limits,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "seconds_by_part": report.seconds_by_part,
        "peak_rss_before": before,
        "peak_rss": peak_process_bytes(),
        "versions": {"autoq": __version__},
    }


def _table(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = [
        f"Quantizing {arguments.layers} of the 22 blocks of TinyLlama-1.1B's shape to w4g128, bf16, "
        f"{arguments.samples} x {arguments.length} tokens, {torch.get_num_threads()} threads.",
        "",
        "| | seconds | peak memory (GB) | of it before quantizing (GB) |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        memory = f"{result['peak_rss'] / 1e9:.2f} | {result['peak_rss_before'] / 1e9:.2f}"
        lines.append(f"| {name} | {result['seconds']:.1f} | {memory} |")
    ours, theirs, within = results.values()
    parts = ", ".join(f"{part} {spent:.1f}" for part, spent in ours["seconds_by_part"].items())
    lines += [
        "",
        f"Of autoq's seconds: {parts}.",
        "",
        f"autoq is {theirs['seconds'] / ours['seconds']:.1f} times as fast; from the disk it takes "
        f"{within['peak_rss'] / theirs['peak_rss']:.0%} of the memory.",
        "",
        f"`python benchmarks/quantization_time.py --layers {arguments.layers} --samples {arguments.samples}`; "
        f"{device_name(torch.device('cpu'))}, autoq {__version__}, torch {torch.__version__}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
