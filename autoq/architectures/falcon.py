"""Falcon in its four layouts: one norm or two, parallel or sequential, q/k/v per head, multi-query or grouped."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup


def _heads(config: PretrainedConfig) -> HeadLayout:
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    if config.new_decoder_architecture:
        return HeadLayout.interleaved(heads, config.num_kv_heads, head_dim)
    if config.multi_query:
        return HeadLayout.consecutive(heads, 1, head_dim)
    return HeadLayout.interleaved(heads, heads, head_dim)


def _value_rows(config: PretrainedConfig) -> Tensor:
    return _heads(config).value_rows()


def _sequential(config: PretrainedConfig) -> bool:
    return not config.new_decoder_architecture and not config.parallel_attn


def _two_parallel_norms(config: PretrainedConfig) -> bool:
    # None means two norms in the new architecture: the 40B checkpoints predate the setting.
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)


def _one_parallel_norm(config: PretrainedConfig) -> bool:
    return not _sequential(config) and not _two_parallel_norms(config)


_QKV = "self_attention.query_key_value"
_UP = "mlp.dense_h_to_4h"


def _block(config: PretrainedConfig) -> BlockParts:
    norm, mlp_norm = "input_layernorm", None
    if _two_parallel_norms(config):
        norm, mlp_norm = "ln_attn", "ln_mlp"
    elif _sequential(config):
        mlp_norm = "post_attention_layernorm"
    return BlockParts(
        heads=_heads(config),
        arrangement=Arrangement.SEQUENTIAL if _sequential(config) else Arrangement.PARALLEL,
        norm=NormKind.LAYER,
        # Alibi is part of the mask that the block is given.
        rotary=RotaryKind.NONE if config.alibi else RotaryKind.HALVES,
        attention="self_attention",
        attention_norm=norm,
        qkv=(_QKV,),
        attention_output="self_attention.dense",
        mlp_norm=mlp_norm,
        up=(_UP,),
        activation="mlp.act",
        down="mlp.dense_4h_to_h",
    )


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
    block=_block,
    rotary="transformer.rotary_emb",
)
