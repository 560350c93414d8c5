"""Quantizes the small Llama that comes with the project and compares the result with the original, offline.

python examples/demo/demo.py
"""

from __future__ import annotations

import tempfile
import warnings
from itertools import islice
from pathlib import Path

import torch
from text import held_out_text, training_documents
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from autoq import AutoQForCausalLM
from autoq.evaluation import compare, measure_generation, model_bytes

MODEL = Path(__file__).with_name("model")
WINDOW = 256
PROMPT = "If the file does not exist,"


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    print(f"autoq demo: a Llama of {_parameters():.1f} million parameters, trained on Python's documentation\n")
    original = AutoQForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
    rows = [("full precision (fp32)", original)]
    with tempfile.TemporaryDirectory() as folder:
        for bits in (4, 3):
            for name, search in (("round to nearest", False), ("AWQ", True)):
                print(f"quantizing to {bits} bits, {name} ...", flush=True)
                rows.append(
                    (f"{bits} bits, {name}", _quantize(tokenizer, bits, search, Path(folder) / f"{name}-{bits}"))
                )
        print()
        _print_table(tokenizer, rows)
        _print_text(tokenizer, rows)
    print(
        "\nNext, after `. .venv/bin/activate`, with a model of your own (a directory or a hub name):\n"
        "  python examples/quantize.py MODEL quantized-model\n"
        "  python examples/generate.py quantized-model 'Once upon a time'\n"
        "  python examples/evaluate.py quantized-model TEXT.txt --reference MODEL"
    )


def _parameters() -> float:
    model = AutoQForCausalLM.from_pretrained(MODEL)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _quantize(tokenizer: PreTrainedTokenizerBase, bits: int, search: bool, folder: Path) -> AutoQForCausalLM:
    """Quantizes, saves and loads again, as one does with a real model."""
    model = AutoQForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
    settings = {"bits": bits, "group_size": 128, "apply_scale": search, "apply_clip": search, "compensate": search}
    texts = list(islice(training_documents(), 200))
    # Rounding to the nearest needs no data but for the report.
    samples = 64 if search else 4
    model.quantize(tokenizer, settings, texts, max_calib_samples=samples, max_calib_seq_len=WINDOW, progress=False)
    model.save_quantized(folder)
    return AutoQForCausalLM.from_quantized(folder)


def _print_table(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, AutoQForCausalLM]]) -> None:
    original = rows[0][1]
    text = held_out_text()
    print(f"{'':24} {'perplexity':>10} {'divergence':>10} {'size':>9} {'reads 128 tokens':>17} {'writes a token':>15}")
    for name, model in rows:
        quality = compare(original, model, tokenizer, text, WINDOW, batch_size=8, progress=False)
        speed = measure_generation(model, prompt_tokens=128, new_tokens=32)
        print(
            f"{name:24} {quality.model.value:10.3f} {quality.divergence.value:10.5f} "
            f"{model_bytes(model) / 1e6:6.2f} MB {1000 * speed.prefill_seconds:14.1f} ms "
            f"{speed.decode_milliseconds:12.2f} ms"
        )
    print(
        f"\nOn {quality.model.tokens:,} tokens of documentation the model has not seen; lower is better. Divergence\n"
        "(KL, in nats) is how far the predictions are from those in full precision; perplexity is the noisier one.\n"
        "A model this small fits in the cache: what quantization does for speed shows on real ones (see README.md)."
    )


def _print_text(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, AutoQForCausalLM]]) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for name, model in rows:
        if "round" in name:
            continue
        output = model.generate(
            **inputs, min_new_tokens=30, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        print(f"\n{name}:\n  {' '.join(tokenizer.decode(output[0], skip_special_tokens=True).split())}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
