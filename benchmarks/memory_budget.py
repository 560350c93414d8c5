"""Quantizes a checkpoint that is larger than the memory it may take: the time and the peak memory that this takes.

    python benchmarks/memory_budget.py --directory DIR [--shape llama-2-7b] [--max-memory 6GiB] [--samples 32]

Random weights of the shape are written to a directory in DIR once (13 GB for Llama-2-7B's), one block at a time.
Another process then quantizes them from the disk, and goes on where it was if it is stopped and started again; what it
measures is its own peak, of all memory it has mapped. The calibration tokens are random: neither time nor memory depend
on what they say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from machine import device_name
from safetensors.torch import save_file
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM
from writing import write_results

from autoq import AutoQForCausalLM, __version__
from autoq.evaluation.speed import peak_process_bytes
from autoq.placement import megabytes


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(_quantize(arguments)))
        return
    model = _place(arguments) / "model"
    if not (model / "config.json").is_file():
        _write_checkpoint(model, arguments)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    done = subprocess.run([sys.executable, __file__, "--worker", *sys.argv[1:]], check=True, stdout=subprocess.PIPE)
    shutil.rmtree(_place(arguments) / "work")
    result = {"checkpoint": size, **json.loads(done.stdout.splitlines()[-1])}
    text = _table(result, arguments)
    print(text)
    write_results(arguments.output, result, text)


def _place(arguments: argparse.Namespace) -> Path:
    """Where a checkpoint of this shape and what is made of it are kept."""
    layers = "" if arguments.layers is None else f"-{arguments.layers}-blocks"
    place: Path = arguments.directory / f"{arguments.shape}{layers}"
    return place


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where there is room for the checkpoint")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="blocks, if not all of the shape's")
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory_budget"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_checkpoint(directory: Path, arguments: argparse.Namespace) -> None:
    """A sharded checkpoint, never more of it in memory than a block."""
    sizes = dict(SHAPES[arguments.shape])
    sizes["num_hidden_layers"] = arguments.layers or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(block, {})[name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number, shapes in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shapes, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(directory)


def _quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    resumed_at = len(list((_place(arguments) / "work").glob("block-*.safetensors")))
    start = time.perf_counter()
    model = AutoQForCausalLM.from_pretrained(_place(arguments) / "model", device_map="disk")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (arguments.samples, arguments.length), generator=generator)
    loaded = time.perf_counter()
    report = model.quantize(
        None,
        {"bits": 4, "group_size": 128},
        ids,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=arguments.length,
        max_memory=arguments.max_memory,
        work_dir=_place(arguments) / "work",
    )
    quantized = time.perf_counter()
    peak = peak_process_bytes()
    model.save_quantized(_place(arguments) / "quantized")
    saved = time.perf_counter()
    size = sum(path.stat().st_size for path in (_place(arguments) / "quantized").glob("*.safetensors"))
    return {
        "load_seconds": loaded - start,
        "quantize_seconds": quantized - loaded,
        "save_seconds": saved - quantized,
        "quantize_peak": peak,
        "peak": peak_process_bytes(),
        "result": size,
        "seconds_by_part": report.seconds_by_part,
        "blocks": model.config.num_hidden_layers,
        "resumed_at": resumed_at,
        "memory_of_the_machine": psutil.virtual_memory().total,
    }


def _table(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    resumed = ""
    if result["resumed_at"]:
        resumed = f"The seconds are of the blocks from number {result['resumed_at']} on: the run was resumed there.\n\n"
    return (
        "| checkpoint | blocks | allowed | peak | quantizing (s) | a block (s) | saving (s) | result |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {megabytes(result['checkpoint'])} | {result['blocks']} | {arguments.max_memory} "
        f"| {megabytes(result['peak'])} "
        f"| {result['quantize_seconds']:.0f} "
        f"| {result['quantize_seconds'] / max(result['blocks'] - result['resumed_at'], 1):.0f} "
        f"| {result['save_seconds']:.0f} | {megabytes(result['result'])} |\n\n"
        f"Of the seconds: {', '.join(f'{part} {spent:.0f}' for part, spent in result['seconds_by_part'].items())}.\n\n"
        f"{resumed}`python benchmarks/memory_budget.py --shape {arguments.shape} --samples {arguments.samples} "
        f"--length {arguments.length} --max-memory {arguments.max_memory}`; "
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, autoq {__version__}."
    )


if __name__ == "__main__":
    main()
