"""MPT: alibi, no biases, fused q/k/v one after the other."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup


def _heads(config: PretrainedConfig) -> HeadLayout:
    return HeadLayout.consecutive(config.n_heads, config.n_heads, config.d_model // config.n_heads)


def _value_rows(config: PretrainedConfig) -> Tensor:
    return _heads(config).value_rows()


def _block(config: PretrainedConfig) -> BlockParts:
    return BlockParts(
        heads=_heads(config),
        arrangement=Arrangement.SEQUENTIAL,
        norm=NormKind.LAYER,
        rotary=RotaryKind.NONE,
        attention="attn",
        attention_norm="norm_1",
        qkv=("attn.Wqkv",),
        attention_output="attn.out_proj",
        mlp_norm="norm_2",
        up=("ffn.up_proj",),
        activation="ffn.act",
        down="ffn.down_proj",
        position_bias="position_bias",
        inverted_mask=True,
        scale=config.attn_config.softmax_scale,
        clip=config.attn_config.clip_qkv or 0.0,
    )


ARCHITECTURE = Architecture(
    model_types=("mpt",),
    blocks="transformer.blocks",
    scale_groups=(
        ScaleGroup("norm_1", ("attn.Wqkv",)),
        # Clamping q/k/v to clip_qkv is not linear: a scaled V would be clamped elsewhere.
        ScaleGroup(
            "attn.Wqkv", ("attn.out_proj",), rows=_value_rows, when=lambda config: not config.attn_config.clip_qkv
        ),
        ScaleGroup("norm_2", ("ffn.up_proj",)),
        ScaleGroup("ffn.act", ("ffn.down_proj",), activation=True),
    ),
    unclipped=("Wqkv",),
    block=_block,
)
