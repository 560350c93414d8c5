"""GPT-J: one norm feeds attention and MLP in parallel."""

from __future__ import annotations

from autoq.architectures.base import Architecture, ScaleGroup

ARCHITECTURE = Architecture(
    model_types=("gptj",),
    blocks="transformer.h",
    scale_groups=(
        ScaleGroup("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ScaleGroup("attn.v_proj", ("attn.out_proj",)),
        ScaleGroup("mlp.act", ("mlp.fc_out",), activation=True),
    ),
    unclipped=("q_proj", "k_proj"),
)
