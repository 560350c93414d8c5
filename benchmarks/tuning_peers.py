"""The effort "best" beside auto-round: KL divergence to full precision and seconds, on the same data, in one run.

    python benchmarks/tuning_peers.py --auto-round PYTHON --models MODEL [MODEL ...] --calibration FILE.json
        --text FILE.txt [--configs w3g128] [--steps 200] [--batch 8] [--output NAME]

PYTHON is that of an environment with auto-round (see auto_round_worker.py), which is run with its steps and samples a
step as given; its own defaults are 200 and 8. Both get the same first 128 samples (auto-round skips those shorter than
a window), and their results are judged here, on the same windows of held-out text. Writes NAME.md and NAME.json after
each row, and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import device_name
from quality import parse_config
from rows import add_data_options, conditions_of, kept_rows, options_of, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from autoq import AutoQForCausalLM, __version__
from autoq.evaluation import kl_divergence


def main() -> None:
    arguments = _arguments()
    rows = kept_rows(arguments.output, conditions_of(arguments))
    for config in arguments.configs:
        for directory in arguments.models:
            key = {"model": directory.name, "config": config, "steps": arguments.steps, "batch": arguments.batch}
            if not any(key.items() <= row.items() for row in rows):
                rows.append({**key, **_measure(directory, config, arguments)})
                print(_line(rows[-1]), flush=True)
            _write(arguments, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto-round", type=Path, required=True, help="Python of an environment with auto-round")
    add_data_options(parser)
    parser.add_argument("--configs", nargs="*", default=["w3g128"])
    parser.add_argument("--steps", type=int, default=200, help="of auto-round")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step of auto-round")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tuning_peers"))
    return parser.parse_args()


def _measure(directory: Path, config: str, arguments: argparse.Namespace) -> dict[str, Any]:
    bits, group_size = parse_config(config)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def load() -> AutoQForCausalLM:
        return AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)

    reference = load()

    def divergence(model: Any) -> float:
        found = kl_divergence(
            reference, model, tokenizer, arguments.text, arguments.window, arguments.max_windows, 8, progress=False
        )
        return found.value

    model = load()
    start = time.perf_counter()
    model.quantize(
        tokenizer,
        {"bits": bits, "group_size": group_size, "effort": "best"},
        calib_data=arguments.calibration,
        max_calib_seq_len=arguments.window,
        packing=False,
        progress=False,
    )
    ours = {"seconds": time.perf_counter() - start, "divergence": divergence(model)}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "tuned.safetensors"
        options = {
            "model": directory, "calibration": arguments.calibration, "bits": bits, "group-size": group_size,
            "length": arguments.window, "steps": arguments.steps, "batch": arguments.batch, "out": out,
        }  # fmt: skip
        command = [arguments.auto_round, Path(__file__).with_name("auto_round_worker.py")]
        for name, value in options.items():
            command += [f"--{name}", value]
        printed = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
        theirs = json.loads(printed.strip().splitlines()[-1])
        tuned = load()
        missing = tuned.model.load_state_dict(load_file(out), strict=False).missing_keys
        if not theirs["changed"] or missing:
            raise SystemExit(f"auto-round left its model as it was, or without {missing[:1]}")
        theirs["divergence"] = divergence(tuned)
    return {"autoq": ours, "auto-round": theirs}


def _line(row: dict[str, Any]) -> str:
    cells = [f"{1000 * row[name]['divergence']:.2f}, {row[name]['seconds']:.0f} s" for name in ("auto-round", "autoq")]
    return f"| {row['model']} | {row['config']} | {row['steps']} x {row['batch']} | {' | '.join(cells)} |"


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    versions = {
        "auto-round": rows[-1]["auto-round"]["version"],
        "autoq": __version__,
        "torch": torch.__version__,
        "processor": device_name(torch.device("cpu")),
    }
    lines = [
        "KL divergence to full precision x 1000 on held-out text, and seconds; both one after the other in one run.",
        "",
        '| model | config | steps x samples of auto-round | auto-round | autoq, effort "best" |',
        "|---|---|---|---|---|",
        *map(_line, rows),
        "",
        f"`python benchmarks/tuning_peers.py --models {' '.join(dict.fromkeys(row['model'] for row in rows))} "
        f"{options_of(conditions_of(arguments))}`, in one run or several; "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}.",
    ]
    write_rows(arguments.output, conditions_of(arguments), versions, rows, lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
