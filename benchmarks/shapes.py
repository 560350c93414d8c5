"""Models of well-known shapes with random weights: for time and memory, where the weights' values do not matter."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoq import AutoQForCausalLM, QuantConfig
from autoq.architectures import architecture_of
from autoq.architectures.base import named_linears
from autoq.nn import QuantLinear
from autoq.nn.block import fuse_blocks
from autoq.nn.linear import replace_module
from autoq.nn.steps import record_steps
from autoq.quantization.weight import quantize

SHAPES = {
    "tiny": {  # to try a script
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 1024, "max_position_embeddings": 512,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_hidden_layers": 22, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, layers: int | None = None) -> LlamaForCausalLM:
    """A Llama of the shape, cut to some of its blocks unless `layers` is None, in evaluation mode."""
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(default)


def round_to_nearest(model: LlamaForCausalLM, config: QuantConfig) -> AutoQForCausalLM:
    """Quantizes a model in place without a search, to measure how it runs."""
    for block in architecture_of(model.config).decoder_blocks(model):
        for name, linear in list(named_linears(block)):
            weight = quantize(linear.weight.detach(), config.bits, config.group_size, config.zero_point)
            replace_module(block, name, QuantLinear.from_weight(weight, linear.bias))
    if config.lm_head_bits is not None:
        weight = quantize(model.lm_head.weight.detach(), config.lm_head_bits, config.lm_head_group_size)
        replace_module(model, "lm_head", QuantLinear.from_weight(weight))
    fuse_blocks(model)
    record_steps(model)
    return AutoQForCausalLM(model, config)
