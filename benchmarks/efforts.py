"""What each effort costs and gains: KL divergence to full precision and seconds, beside AutoAWQ's result.

    python benchmarks/efforts.py --models MODEL [MODEL ...] --calibration FILE.json --text FILE.txt \
        --autoawq-results DIR [--configs w4g128 w3g128] [--efforts fast default best] [--output NAME]

Each MODEL is a model directory; some may be made by planted.py. AutoAWQ's results are those that quality.py keeps, on
the same data and bits; they are judged here, on the same windows of held-out text. Writes NAME.md and NAME.json after
each row, and goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import parse_config
from rows import add_data_options, conditions_of, kept_rows, options_of, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from autoq import AutoQForCausalLM, __version__
from autoq.config import EFFORTS
from autoq.evaluation import kl_divergence


def main() -> None:
    arguments = _arguments()
    rows = kept_rows(arguments.output, conditions_of(arguments))
    done = {(row["model"], row["config"]) for row in rows}
    for config in arguments.configs:
        for directory in arguments.models:
            if (directory.name, config) not in done:
                rows.append(_measure(directory, config, arguments))
                print(_line(rows[-1], arguments.efforts), flush=True)
            _write(arguments, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--configs", nargs="*", default=["w4g128", "w3g128"])
    parser.add_argument("--efforts", nargs="*", default=list(EFFORTS))
    parser.add_argument("--autoawq-results", type=Path, required=True, help="where quality.py keeps AutoAWQ's results")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/efforts"))
    return parser.parse_args()


def _measure(directory: Path, config: str, arguments: argparse.Namespace) -> dict[str, Any]:
    bits, group_size = parse_config(config)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)

    def divergence(model: Any) -> float:
        found = kl_divergence(
            reference, model, tokenizer, arguments.text, arguments.window, arguments.max_windows, 8, progress=False
        )
        return found.value

    row: dict[str, Any] = {"model": directory.name, "config": config}
    for effort in arguments.efforts:
        model = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
        start = time.perf_counter()
        model.quantize(
            tokenizer,
            {"bits": bits, "group_size": group_size, "effort": effort},
            calib_data=arguments.calibration,
            max_calib_seq_len=arguments.window,
            progress=False,
        )
        row[effort] = {"seconds": time.perf_counter() - start, "divergence": divergence(model)}
    weights = arguments.autoawq_results / f"{directory.name}-{config}" / "model.safetensors"
    if weights.is_file():
        model = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
        model.model.load_state_dict(load_file(weights), strict=False)
        row["AutoAWQ"] = {"divergence": divergence(model)}
    return row


def _line(row: dict[str, Any], efforts: list[str]) -> str:
    theirs = row.get("AutoAWQ", {}).get("divergence")
    cells = [f"{1000 * theirs:.2f}" if theirs else "-"]
    for effort in efforts:
        ours = row[effort]["divergence"]
        closed = f", {1 - ours / theirs:.0%}" if theirs else ""
        cells.append(f"{1000 * ours:.2f}{closed}, {row[effort]['seconds']:.0f} s")
    return f"| {row['model']} | {row['config']} | {' | '.join(cells)} |"


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    versions = {
        "autoq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    efforts: list[str] = arguments.efforts
    lines = [
        "KL divergence to full precision x 1000 on held-out text, the share of AutoAWQ's that is gone, and seconds.",
        "",
        f"| model | config | AutoAWQ | {' | '.join(efforts)} |",
        "|---|---|---|" + "---|" * len(efforts),
        *(_line(row, efforts) for row in rows),
        "",
    ]
    models = " ".join(dict.fromkeys(row["model"] for row in rows))
    configs = " ".join(dict.fromkeys(row["config"] for row in rows))
    lines.append(
        f"`python benchmarks/efforts.py --models {models} --configs {configs} {options_of(conditions_of(arguments))} "
        f"--autoawq-results {arguments.autoawq_results.name}`, in one run or several; "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    write_rows(arguments.output, conditions_of(arguments), versions, rows, lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
