"""OPT, with the norm before (most sizes) or after (350m) attention and MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, Arrangement, BlockParts, HeadLayout, NormKind, RotaryKind, ScaleGroup


def _norm_can_absorb(config: PretrainedConfig) -> bool:
    # Behind the residual sum (350m) the norm's output is the next residual too; without elementwise_affine it has
    # no weight to scale.
    return config.do_layer_norm_before and config.layer_norm_elementwise_affine


def _is_relu(config: PretrainedConfig) -> bool:
    # relu(x / s) = relu(x) / s for positive s; no other activation passes a scale through.
    return config.activation_function == "relu"


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _block(config: PretrainedConfig) -> BlockParts:
    heads = config.num_attention_heads
    return BlockParts(
        heads=HeadLayout.consecutive(heads, heads, config.hidden_size // heads),
        arrangement=Arrangement.SEQUENTIAL if config.do_layer_norm_before else Arrangement.POST_NORM,
        norm=NormKind.LAYER,
        rotary=RotaryKind.NONE,
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        qkv=_QKV,
        attention_output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        activation="activation_fn",
        down="fc2",
        returns_tuple=False,
    )


ARCHITECTURE = Architecture(
    model_types=("opt",),
    blocks="model.decoder.layers",
    scale_groups=(
        ScaleGroup("self_attn_layer_norm", _QKV, when=_norm_can_absorb),
        ScaleGroup("self_attn.v_proj", ("self_attn.out_proj",)),
        ScaleGroup("final_layer_norm", ("fc1",), when=_norm_can_absorb),
        ScaleGroup("fc1", ("fc2",), when=_is_relu),
        ScaleGroup("activation_fn", ("fc2",), activation=True, when=lambda config: not _is_relu(config)),
    ),
    unclipped=("q_proj", "k_proj"),
    block=_block,
)
