"""Checks GEMM checkpoints against AutoAWQ: its code reads ours bit for bit, and we read its.

    python benchmarks/compare_formats.py --autoawq PYTHON --calibration FILE.json MODEL [MODEL ...]

For each model: quantize and save with autoq, dequantize the files with AutoAWQ's own code (autoawq_worker.py, in an
environment of its own) and compare with our weights; then quantize and save with AutoAWQ, load that with autoq, and
compare our weights with AutoAWQ's dequantization of the same files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from autoq import AutoQForCausalLM
from autoq.nn import QuantLinear

_WORKER = Path(__file__).with_name("autoawq_worker.py")


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="directories of full-precision models")
    parser.add_argument("--autoawq", type=Path, required=True, help="Python of an environment with AutoAWQ")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON list of strings")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples: the search does not matter here")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    failures = 0
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for name, make in (("autoq", _save_with_autoq), ("AutoAWQ", _save_with_autoawq)):
                checkpoint = Path(folder) / name
                make(model, checkpoint, arguments)
                linears, differing = _compare(checkpoint, arguments)
                failures += differing
                verdict = "equal bit for bit" if not differing else f"{differing} DIFFER"
                print(f"{model.name}, saved by {name}: {linears} linears, {verdict}", flush=True)
    return f"{failures} linears differ" if failures else None


def _save_with_autoq(model: Path, checkpoint: Path, arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    quantized = AutoQForCausalLM.from_pretrained(model)
    quantized.quantize(
        tokenizer,
        {"bits": 4, "group_size": arguments.group_size},
        arguments.calibration,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=256,
        progress=False,
    )
    quantized.save_quantized(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def _save_with_autoawq(model: Path, checkpoint: Path, arguments: argparse.Namespace) -> None:
    _run_worker(
        arguments, "quantize-native", "--model", model, "--calibration", arguments.calibration, "--bits", 4,
        "--group-size", arguments.group_size, "--max-samples", arguments.samples, "--out", checkpoint,
    )  # fmt: skip


def _compare(checkpoint: Path, arguments: argparse.Namespace) -> tuple[int, int]:
    """How many linears a checkpoint has, and in how many our weight differs from AutoAWQ's dequantization."""
    file = checkpoint / "dequantized.tensors"
    _run_worker(arguments, "dequantize", "--checkpoint", checkpoint, "--out", file)
    theirs = load_file(file)
    model = AutoQForCausalLM.from_quantized(checkpoint, device_map="cpu", torch_dtype=torch.float16)
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, QuantLinear)}
    differing = sum(not torch.equal(module.weight, theirs[f"{name}.weight"]) for name, module in linears.items())
    return len(linears), differing


def _run_worker(arguments: argparse.Namespace, *options: Any) -> None:
    command = [str(part) for part in (arguments.autoawq, "-W", "ignore", _WORKER, *options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
