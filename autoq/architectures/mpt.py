"""MPT: alibi, no biases, fused q/k/v one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from autoq.architectures.base import Architecture, ScaleGroup


def _value_rows(config: PretrainedConfig) -> Tensor:
    return torch.arange(2 * config.d_model, 3 * config.d_model)


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
)
