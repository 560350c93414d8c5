"""Perplexity and KL divergence of round-to-nearest, autoq and AutoAWQ on the same models, data and bits.

    python benchmarks/quality.py --models MODELS --calibration FILE.json --text FILE.txt \
        [--autoawq PYTHON] [--autoawq-results DIR] [--configs w4g128 w3g32 ...] [--output NAME]

MODELS is a directory with one model directory each. Every model is calibrated on the strings of the JSON file, each
one sample, and evaluated in fp32 on non-overlapping windows of the text, all linears of the decoder blocks quantized.
AutoAWQ runs in an environment of its own, whose Python is given with --autoawq (see autoawq_worker.py); its results
are kept in the --autoawq-results directory and used again from there. Writes NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from writing import write_results

from autoq import AutoQForCausalLM, __version__
from autoq.architectures import architecture_of
from autoq.architectures.base import named_linears
from autoq.evaluation.divergence import Comparison, compare
from autoq.quantization.weight import fake_quantize

CONFIGS = ("w4g128", "w4g32", "w3g128", "w3g32")
_WORKER = Path(__file__).with_name("autoawq_worker.py")


def main() -> None:
    arguments = _arguments()
    rows = []
    kept = {}
    if arguments.keep and arguments.output.with_suffix(".json").is_file():
        measured = json.loads(arguments.output.with_suffix(".json").read_text())["rows"]
        kept = {(row["model"], row["config"]): row for row in measured}
    for directory in sorted(path for path in arguments.models.iterdir() if (path / "config.json").is_file()):
        if arguments.only and directory.name not in arguments.only:
            continue
        for config in arguments.configs:
            row = kept.get((directory.name, config)) or _measure(directory, config, arguments)
            if "AutoAWQ" not in row:
                row.update(_measure_autoawq(directory, config, arguments))
            rows.append(row)
            print(_table([rows[-1]]).splitlines()[-1], flush=True)
            _write(arguments.output, rows)
    print(_table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory of model directories")
    parser.add_argument("--only", nargs="*", help="names of the models to measure (default: all)")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON list of strings, one sample each")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sample and of a window")
    parser.add_argument("--max-windows", type=int, help="evaluate on the first so many windows only")
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS), help="such as w4g128")
    parser.add_argument("--autoawq", type=Path, help="Python of an environment with AutoAWQ")
    parser.add_argument("--autoawq-results", type=Path, help="where AutoAWQ's quantized weights are kept")
    parser.add_argument("--keep", action="store_true", help="keep the rows an earlier run has written")
    parser.add_argument("--settings", type=json.loads, default={}, help="further quant_config settings, as JSON")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality"))
    return parser.parse_args()


def parse_config(config: str) -> tuple[int, int]:
    match = re.fullmatch(r"w(\d+)g(-?\d+)", config)
    if match is None:
        raise SystemExit(f"{config!r} is no configuration; write it like w4g128")
    return int(match[1]), int(match[2])


def _measure(directory: Path, config: str, arguments: argparse.Namespace) -> dict[str, Any]:
    bits, group_size = parse_config(config)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)

    def evaluate(model: Any) -> Comparison:
        return compare(
            reference, model, tokenizer, arguments.text, arguments.window, arguments.max_windows, 8, progress=False
        )

    row: dict[str, Any] = {"model": directory.name, "config": config}
    nearest = evaluate(_round_to_nearest(directory, bits, group_size))
    row["full precision"] = {"perplexity": nearest.reference.value}
    row["round to nearest"] = _figures(nearest)
    model = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    start = time.perf_counter()
    model.quantize(
        tokenizer,
        {"bits": bits, "group_size": group_size, **arguments.settings},
        calib_data=arguments.calibration,
        max_calib_seq_len=arguments.window,
        progress=False,
    )
    row["autoq"] = {"seconds": time.perf_counter() - start, **_figures(evaluate(model))}
    return row


def _round_to_nearest(directory: Path, bits: int, group_size: int) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for block in architecture_of(model.config).decoder_blocks(model):
            for _, linear in named_linears(block):
                linear.weight.copy_(fake_quantize(linear.weight, bits, group_size))
    return model


def _measure_autoawq(directory: Path, config: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """AutoAWQ's figures, both made and measured by autoawq_worker.py in AutoAWQ's own environment."""
    if arguments.autoawq_results is None:
        return {}
    results: Path = arguments.autoawq_results / f"{directory.name}-{config}"
    if not (results / "evaluation.json").is_file():
        if arguments.autoawq is None:
            return {}
        bits, group_size = parse_config(config)
        _run_worker(
            arguments, "quantize", "--model", directory, "--calibration", arguments.calibration, "--bits", bits,
            "--group-size", group_size, "--seq-len", arguments.window, "--out", results,
        )  # fmt: skip
        weights = results / "model.safetensors"
        evaluation = _run_worker(
            arguments, "evaluate", "--model", directory, "--weights", weights, "--text", arguments.text
        )
        (results / "evaluation.json").write_text(evaluation)
    return {"AutoAWQ": {part: json.loads((results / f"{part}.json").read_text()) for part in ("evaluation", "result")}}


def _run_worker(arguments: argparse.Namespace, *options: Any) -> str:
    command = [str(part) for part in (arguments.autoawq, _WORKER, *options)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _figures(comparison: Comparison) -> dict[str, float]:
    return {
        "perplexity": comparison.model.value,
        "divergence": comparison.divergence.value,
        "top1_agreement": comparison.divergence.top1_agreement,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    methods = ("round to nearest", "autoq", "AutoAWQ")
    lines = [
        f"| model | config | full precision | {' | '.join(methods)} |",
        "|---|---|---|" + "---|" * len(methods),
    ]
    for row in rows:
        figures = {**row, "AutoAWQ": row.get("AutoAWQ", {}).get("evaluation")}
        cells = [
            f"{found['perplexity']:.4f} / {1000 * found['divergence']:.2f}" if found else "-"
            for found in (figures[method] for method in methods)
        ]
        cells.insert(0, f"{row['full precision']['perplexity']:.4f}")
        lines.append(f"| {row['model']} | {row['config']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    versions = {
        "autoq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    heading = "Perplexity / KL divergence to full precision x 1000, held-out text; lower is better.\n\n"
    options = " ".join(Path(part).name if "/" in part else part for part in sys.argv[1:])
    command = f"\n\n`python benchmarks/quality.py {options}`; {', '.join(f'{k} {v}' for k, v in versions.items())}.\n"
    write_results(output, {"versions": versions, "rows": rows}, heading + _table(rows) + command)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
