"""Bloom: alibi, fused q/k/v interleaved per head."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup


def _heads(config: PretrainedConfig) -> HeadLayout:
    return HeadLayout.interleaved(config.n_head, config.n_head, config.hidden_size // config.n_head)


def _value_rows(config: PretrainedConfig) -> Tensor:
    return _heads(config).value_rows()


def _norm_feeds_only_linears(config: PretrainedConfig) -> bool:
    return not config.apply_residual_connection_post_layernorm


def _block(config: PretrainedConfig) -> BlockParts:
    sequential = _norm_feeds_only_linears(config)
    return BlockParts(
        heads=_heads(config),
        arrangement=Arrangement.SEQUENTIAL if sequential else Arrangement.NORMED_RESIDUAL,
        norm=NormKind.LAYER,
        rotary=RotaryKind.NONE,
        attention="self_attention",
        attention_norm="input_layernorm",
        qkv=("self_attention.query_key_value",),
        attention_output="self_attention.dense",
        mlp_norm="post_attention_layernorm",
        up=("mlp.dense_h_to_4h",),
        activation="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        position_bias="alibi",
    )


ARCHITECTURE = Architecture(
    model_types=("bloom",),
    blocks="transformer.h",
    scale_groups=(
        ScaleGroup("input_layernorm", ("self_attention.query_key_value",), when=_norm_feeds_only_linears),
        ScaleGroup("self_attention.query_key_value", ("self_attention.dense",), rows=_value_rows),
        ScaleGroup("post_attention_layernorm", ("mlp.dense_h_to_4h",), when=_norm_feeds_only_linears),
        ScaleGroup("mlp.gelu_impl", ("mlp.dense_4h_to_h",), activation=True),
    ),
    unclipped=("query_key_value",),
    block=_block,
)
