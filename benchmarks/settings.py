"""What settings beside the bits cost and gain: KL divergence to full precision, and bytes.

    python benchmarks/settings.py --models MODEL [MODEL ...] --calibration FILE.json --text FILE.txt
        [--settings JSON ...] [--output NAME]

Each MODEL is a model directory; each JSON the `quant_config` of a row, such as '{"target_bits": 3.25}'. The bytes are
those of a saved checkpoint's weights. Writes NAME.md and NAME.json after each row, and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rows import add_data_options, conditions_of, kept_rows, options_of, write_rows
from transformers import AutoTokenizer

from autoq import AutoQForCausalLM, __version__
from autoq.evaluation import kl_divergence
from autoq.placement import megabytes

_SETTINGS = (
    {"bits": 3}, {"target_bits": 3.0}, {"target_bits": 3.25}, {"target_bits": 3.5}, {"bits": 4}, {"target_bits": 4.0},
    {"target_bits": 4.25}, {"bits": 4, "lm_head_bits": 8}, {"bits": 4, "lm_head_bits": 4},
    {"bits": 4, "embedding_bits": 8}, {"bits": 4, "embedding_bits": 4},
    {"bits": 4, "lm_head_bits": 8, "embedding_bits": 8}, {"bits": 4, "lm_head_bits": 4, "embedding_bits": 4},
)  # fmt: skip


def main() -> None:
    arguments = _arguments()
    rows = kept_rows(arguments.output, conditions_of(arguments))
    for directory in arguments.models:
        for settings in arguments.settings:
            if not any(row["model"] == directory.name and row["settings"] == settings for row in rows):
                rows.append(_measure(directory, settings, arguments))
                print(_line(rows[-1]), flush=True)
            _write(arguments, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--settings", type=json.loads, nargs="+", default=list(_SETTINGS), help="JSON objects")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/settings"))
    return parser.parse_args()


def _measure(directory: Path, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    model = AutoQForCausalLM.from_pretrained(directory, torch_dtype=torch.float16)
    model.float()  # what is not quantized is saved in 16 bits, and was rounded to that before
    model.quantize(
        tokenizer, settings, calib_data=arguments.calibration, max_calib_seq_len=arguments.window, progress=False
    )
    found = kl_divergence(
        reference, model, tokenizer, arguments.text, arguments.window, arguments.max_windows, 8, progress=False
    )
    with tempfile.TemporaryDirectory() as saved:
        model.half().save_quantized(saved)
        size = sum(path.stat().st_size for path in Path(saved).glob("*.safetensors"))
    return {"model": directory.name, "settings": settings, "bytes": size, "divergence": found.value}


def _line(row: dict[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
    return f"| {row['model']} | {settings} | {megabytes(row['bytes'])} | {1000 * row['divergence']:.2f} |"


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    versions = {
        "autoq": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    models = " ".join(dict.fromkeys(row["model"] for row in rows))
    lines = [
        "Weights of the saved checkpoint (what is not quantized in fp16), and KL divergence to full precision x 1000",
        "on held-out text. Groups of 128 where they divide, the default effort.",
        "",
        "| model | settings | weights | KL x 1000 |",
        "|---|---|---|---|",
        *map(_line, rows),
        "",
        f"`python benchmarks/settings.py --models {models} {options_of(conditions_of(arguments))}`, in one run or "
        f"several; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
    ]
    write_rows(arguments.output, conditions_of(arguments), versions, rows, lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
