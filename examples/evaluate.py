"""Perplexity of a model on a text, and how far it is from the full-precision model it was made from.

python examples/evaluate.py MODEL TEXT.txt [--reference FULL_PRECISION_MODEL] [--sequence-length 2048]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from autoq import AutoQForCausalLM
from autoq.errors import AutoQError, ConfigError
from autoq.evaluation import compare, perplexity


def load(path: str) -> AutoQForCausalLM:
    """A quantized or a full-precision model, whichever is there."""
    try:
        return AutoQForCausalLM.from_pretrained(path)
    except ConfigError:  # it is quantized
        return AutoQForCausalLM.from_quantized(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("text", type=Path, help="text file, such as wikitext-2's test split")
    parser.add_argument("--reference", help="directory or hub name of the full-precision model")
    parser.add_argument("--sequence-length", type=int, help="tokens of a window (default: the context, at most 2048)")
    parser.add_argument("--max-windows", type=int, help="use only the first windows of the text")
    arguments = parser.parse_args()

    model = load(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.reference is None:
        result = perplexity(model, tokenizer, arguments.text, arguments.sequence_length, arguments.max_windows)
        print(f"perplexity {result.value:.4f} over {result.windows} windows, {result.tokens:,} tokens")
        return
    reference = load(arguments.reference)
    both = compare(reference, model, tokenizer, arguments.text, arguments.sequence_length, arguments.max_windows)
    print(f"perplexity {both.model.value:.4f}, full precision {both.reference.value:.4f}")
    print(f"KL divergence {both.divergence.value:.5f} nats, same top token {both.divergence.top1_agreement:.2%}")


if __name__ == "__main__":
    try:
        main()
    except (AutoQError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
