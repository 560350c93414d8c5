"""How long a quantized checkpoint takes to its first token, beside plain reading of its files.

    python benchmarks/loading.py [--shape tinyllama-1.1b | --model DIR] [--rounds 3]

A shape is measured with random weights, quantized to 4 bits. In each round the files are read into a buffer, and a new
process loads the model on the CPU and makes one token of a prompt of eight; first with the files in the system's page
cache, then without (where a process can have them dropped; they have to be on a disk for that, see --work). A first
round is not counted, nor is importing torch and transformers. Writes Markdown and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from machine import device_name
from shapes import SHAPES, random_model, round_to_nearest
from writing import write_results

from autoq import AutoQForCausalLM, QuantConfig, __version__

_CHUNK = 2**24


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_load(arguments.model)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        directory = arguments.model or Path(folder) / "model"
        if arguments.model is None:
            quantized = round_to_nearest(random_model(arguments.shape, torch.bfloat16), QuantConfig())
            quantized.save_quantized(directory)
            del quantized
        files = sorted(directory.glob("*.safetensors"))
        states = [True, False] if hasattr(os, "posix_fadvise") else [True]
        rounds = [
            {"cached": cached, **_measure(directory, files, cached)}
            for _ in range(1 + arguments.rounds)
            for cached in states
        ][len(states) :]
        size = sum(path.stat().st_size for path in files)
    shape = f"--shape {arguments.shape}" if arguments.model is None else f"--model {arguments.model.name}"
    results = {
        "command": f"python benchmarks/loading.py {shape} --rounds {arguments.rounds}",
        "bytes": size, "rounds": rounds, "device": device_name(torch.device("cpu")),
        "versions": {"autoq": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    text = _markdown(results)
    print(text)
    write_results(arguments.output, results, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b", help="with random weights")
    parser.add_argument("--model", type=Path, help="a quantized checkpoint, instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the checkpoint is written, if not with other temporary files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loading"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _load(directory: Path) -> dict[str, float]:
    """Seconds to load a model, and then to its first token."""
    start = time.perf_counter()
    model = AutoQForCausalLM.from_quantized(directory, device_map="cpu", torch_dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model.generate(torch.arange(1, 9)[None], max_new_tokens=1, do_sample=False)
    return {"load": loaded - start, "first token": time.perf_counter() - loaded}


def _measure(directory: Path, files: list[Path], cached: bool) -> dict[str, float]:
    """Seconds of reading the files, of loading the model and of its first token."""
    if cached:
        _read(files)
    else:
        _drop(files)
    seconds = {"read": _read(files)}
    if not cached:
        _drop(files)
    command = [sys.executable, __file__, "--worker", "--model", str(directory)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {**seconds, **json.loads(output.splitlines()[-1])}


def _read(files: list[Path]) -> float:
    buffer = bytearray(_CHUNK)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def _drop(files: list[Path]) -> None:
    """Has the system forget what it holds of the files in memory."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _markdown(results: dict) -> str:
    size = results["bytes"] / 1e9
    lines = ["| Files | Reading them | Loading the model | First token |", "|---|---|---|---|"]
    for cached, name in ((True, "in the page cache"), (False, "on the disk")):
        rounds = [entry for entry in results["rounds"] if entry["cached"] == cached]
        if rounds:
            cells = (_cell([entry[part] for entry in rounds]) for part in ("read", "load", "first token"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [
        "",
        f"{size:.2f} GB, on the CPU; seconds, medians of the rounds (least - largest).",
        f"{results['device']}; {versions}.",
        "",
        f"    {results['command']}",
        "",
    ]
    return "\n".join(lines)


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})"


if __name__ == "__main__":
    main()
