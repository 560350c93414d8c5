"""Llama, and the families that share its block: RMS norm, separate q/k/v, gated MLP."""

from __future__ import annotations

from autoq.architectures.base import Architecture, ScaleGroup, grouped_value_rows

ARCHITECTURE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    scale_groups=(
        ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), rows=grouped_value_rows),
        ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        # act(gate) * up: the product is linear in up, whatever the activation.
        ScaleGroup("mlp.up_proj", ("mlp.down_proj",)),
    ),
    unclipped=("q_proj", "k_proj"),
)
