"""Falcon in its four layouts: one norm or two, parallel or sequential, q/k/v per head, multi-query or grouped."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, ScaleGroup, interleaved_value_rows


def _value_rows(config: PretrainedConfig) -> Tensor:
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    if config.new_decoder_architecture:
        # [KV heads, (queries of the KV head, k, v), head_dim]
        kv_heads = config.num_kv_heads
        queries = heads // kv_heads
        rows = torch.arange(kv_heads * (queries + 2) * head_dim).view(kv_heads, queries + 2, head_dim)[:, -1:]
        return rows.expand(kv_heads, queries, head_dim).reshape(-1)
    if config.multi_query:
        # [(queries of every head, k, v), head_dim]: one V for all heads.
        return torch.arange((heads + 1) * head_dim, (heads + 2) * head_dim).repeat(heads)
    return interleaved_value_rows(heads, head_dim)


def _sequential(config: PretrainedConfig) -> bool:
    return not config.new_decoder_architecture and not config.parallel_attn


def _two_parallel_norms(config: PretrainedConfig) -> bool:
    # None means two norms in the new architecture: the 40B checkpoints predate the setting.
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)


def _one_parallel_norm(config: PretrainedConfig) -> bool:
    return not _sequential(config) and not _two_parallel_norms(config)


_QKV = "self_attention.query_key_value"
_UP = "mlp.dense_h_to_4h"

ARCHITECTURE = Architecture(
    model_types=("falcon",),
    blocks="transformer.h",
    scale_groups=(
        ScaleGroup("input_layernorm", (_QKV, _UP), when=_one_parallel_norm),
        ScaleGroup("ln_attn", (_QKV,), when=_two_parallel_norms),
        ScaleGroup("input_layernorm", (_QKV,), when=_sequential),
        ScaleGroup(_QKV, ("self_attention.dense",), rows=_value_rows),
        ScaleGroup("ln_mlp", (_UP,), when=_two_parallel_norms),
        ScaleGroup("post_attention_layernorm", (_UP,), when=_sequential),
        ScaleGroup("mlp.act", ("mlp.dense_4h_to_h",), activation=True),
    ),
    unclipped=("query_key_value",),
)
