"""Plants outlier channels, as large models show them, in a small model without changing its function.

    python benchmarks/planted.py MODEL OUTPUT

In every block, one channel in a hundred of what a norm gives is multiplied by 20 to 100, and the weights that read it
are divided by as much. MODEL and OUTPUT are directories of transformers models; the result is saved in fp32, so that
it is the same function to the last digits.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoq.architectures import architecture_of
from autoq.quantization.awq import fold_scale

SHARE = 0.01
FACTORS = (20.0, 100.0)


def plant(model: PreTrainedModel, seed: int = 0) -> None:
    """Plants the outliers, in place; their factors are drawn uniformly on a logarithmic scale."""
    architecture = architecture_of(model.config)
    generator = torch.Generator().manual_seed(seed)
    low, high = map(math.log, FACTORS)
    for block in architecture.decoder_blocks(model):
        for group in architecture.groups(model.config):
            prev = block.get_submodule(group.prev)
            if isinstance(prev, torch.nn.Linear):
                continue
            linears = [block.get_submodule(name) for name in group.linears]
            channels = linears[0].in_features
            chosen = torch.randperm(channels, generator=generator)[: math.ceil(SHARE * channels)]
            scale = torch.ones(channels)
            scale[chosen] = torch.empty(len(chosen)).uniform_(-high, -low, generator=generator).exp()
            fold_scale(prev, linears, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    plant(model)
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
