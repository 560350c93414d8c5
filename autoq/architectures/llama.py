"""Llama, and the families that share its block: RMS norm, separate q/k/v, gated MLP."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _heads(config: PretrainedConfig) -> HeadLayout:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadLayout.consecutive(heads, config.num_key_value_heads or heads, head_dim)


def _value_rows(config: PretrainedConfig) -> Tensor:
    heads = _heads(config)
    return heads.value_rows() - heads.value_offset


def _block(config: PretrainedConfig) -> BlockParts:
    head_norms = config.model_type == "qwen3"
    return BlockParts(
        heads=_heads(config),
        arrangement=Arrangement.SEQUENTIAL,
        norm=NormKind.RMS,
        rotary=RotaryKind.HALVES,
        attention="self_attn",
        attention_norm="input_layernorm",
        qkv=_QKV,
        attention_output="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        up=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        down="mlp.down_proj",
        query_norm="self_attn.q_norm" if head_norms else None,
        key_norm="self_attn.k_norm" if head_norms else None,
        returns_tuple=False,
    )


ARCHITECTURE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    scale_groups=(
        ScaleGroup("input_layernorm", _QKV),
        ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), rows=_value_rows),
        ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        # act(gate) * up: the product is linear in up, whatever the activation.
        ScaleGroup("mlp.up_proj", ("mlp.down_proj",)),
    ),
    unclipped=("q_proj", "k_proj"),
    block=_block,
    final_norm="model.norm",
    rotary="model.rotary_emb",
)
