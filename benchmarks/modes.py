"""Perplexity of the linears' modes against the same quantized model computed in float64, and against torch in bf16.

    python benchmarks/modes.py --models MODELS --text FILE.txt [--bits 4] [--group-size 128] [--max-windows 40]

MODELS is a directory with one model directory each. Each is quantized by round to nearest, without a search: what is
compared is arithmetic on the same weights: that of many rows in both modes, and that of few rows, by which tokens are
decoded. Writes NAME.md and NAME.json (--output).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import round_to_nearest
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from writing import write_results

from autoq import QuantConfig, __version__
from autoq.evaluation.divergence import compare
from autoq.nn import QuantLinear
from autoq.nn.linear import replace_module
from autoq.quantization.weight import dequantize

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    arguments = _arguments()
    rows = []
    for directory in sorted(path for path in arguments.models.iterdir() if (path / "config.json").is_file()):
        rows.append(_measure(directory, arguments))
        print(_table(rows).splitlines()[-1], flush=True)
    _write(arguments.output, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory of model directories")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--max-windows", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/modes"))
    return parser.parse_args()


def _measure(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = QuantConfig(bits=arguments.bits, group_size=arguments.group_size)
    reference = _dense(_quantized(directory, torch.float32, config), torch.float64)
    row: dict[str, Any] = {"model": directory.name}

    def evaluate(name: str, model: nn.Module) -> None:
        found = compare(
            reference, model, tokenizer, arguments.text, arguments.window, arguments.max_windows, 4, progress=False
        )
        row["float64"] = found.reference.value
        row[name] = {"perplexity": found.model.value, "divergence": found.divergence.value}

    for dtype_name, dtype in _DTYPES.items():
        model = _quantized(directory, dtype, config)
        for mode in ("exact", "int8"):
            for module in model.modules():
                if isinstance(module, QuantLinear):
                    module.mode = mode
            evaluate(f"{mode}, {dtype_name}", model)
        evaluate(f"few rows, {dtype_name}", _FewRows(model))
    evaluate("torch, bf16", _dense(_quantized(directory, torch.bfloat16, config), torch.bfloat16))
    return row


class _FewRows(nn.Module):
    """A model that is given two tokens of each of four windows at a time, as when it decodes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = model
        self.config = model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    def forward(self, batch: Tensor, use_cache: bool) -> CausalLMOutput:
        cache = DynamicCache(config=self.config)
        parts = [self._model(part, past_key_values=cache, use_cache=True).logits for part in batch.split(2, dim=1)]
        return CausalLMOutput(logits=torch.cat(parts, dim=1))


def _quantized(directory: Path, dtype: torch.dtype, config: QuantConfig) -> Any:
    return round_to_nearest(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval(), config).model


def _dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its quantized weights as dense ones, in a dtype."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
            linear.weight.data = dequantize(module.quantized_weight(), torch.float64).to(dtype)
            if module.bias is not None:
                linear.bias.data = module.bias.to(dtype)
            replace_module(model, name, linear)
    return model.to(dtype)  # type: ignore[arg-type]


def _table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("model", "float64")]
    lines = [f"| model | float64 | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [
            f"{100 * (row[name]['perplexity'] / row['float64'] - 1):+.4f}% / {1e6 * row[name]['divergence']:.2f}"
            for name in names
        ]
        lines.append(f"| {row['model']} | {row['float64']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    versions = {"autoq": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    options = " ".join(Path(part).name if "/" in part else part for part in sys.argv[1:])
    heading = (
        "Perplexity of the same quantized model: of float64 arithmetic, and how far from it the others are"
        " / their KL divergence from it x 10^6.\n\n"
    )
    command = f"\n\n`python benchmarks/modes.py {options}`; {', '.join(f'{k} {v}' for k, v in versions.items())}.\n"
    write_results(output, {"versions": versions, "rows": rows}, heading + _table(rows) + command)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
