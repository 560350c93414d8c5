"""GPT-J: one norm feeds attention and MLP in parallel."""

from __future__ import annotations

from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup

_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def _block(config: PretrainedConfig) -> BlockParts:
    return BlockParts(
        heads=HeadLayout.consecutive(config.n_head, config.n_head, config.n_embd // config.n_head),
        arrangement=Arrangement.PARALLEL,
        norm=NormKind.LAYER,
        rotary=RotaryKind.PAIRS,
        attention="attn",
        attention_norm="ln_1",
        qkv=_QKV,
        attention_output="attn.out_proj",
        mlp_norm=None,
        up=("mlp.fc_in",),
        activation="mlp.act",
        down="mlp.fc_out",
    )


ARCHITECTURE = Architecture(
    model_types=("gptj",),
    blocks="transformer.h",
    scale_groups=(
        ScaleGroup("ln_1", (*_QKV, "mlp.fc_in")),
        ScaleGroup("attn.v_proj", ("attn.out_proj",)),
        ScaleGroup("mlp.act", ("mlp.fc_out",), activation=True),
    ),
    unclipped=("q_proj", "k_proj"),
    block=_block,
)
