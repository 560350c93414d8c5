"""Bloom: alibi, fused q/k/v interleaved per head."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, ScaleGroup, interleaved_value_rows


def _value_rows(config: PretrainedConfig) -> Tensor:
    return interleaved_value_rows(config.n_head, config.hidden_size // config.n_head)


def _norm_feeds_only_linears(config: PretrainedConfig) -> bool:
    return not config.apply_residual_connection_post_layernorm


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
)
