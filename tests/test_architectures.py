"""The declarations of autoq/architectures against the models themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import VARIANTS, VOCABULARY, Variant
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

from autoq.architectures import ScaleGroup, all_architectures, architecture_of, mpt
from autoq.architectures.base import named_linears
from autoq.errors import ArchitectureError
from autoq.nn import ScaledActivation
from autoq.nn.linear import replace_module
from autoq.quantization.awq import fold_scale

by_name = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def _fold_random_scales(model: PreTrainedModel, groups: list[ScaleGroup], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for block in architecture_of(model.config).decoder_blocks(model):
        for group in groups:
            linears = [block.get_submodule(name) for name in group.linears]
            channels = linears[0].in_features
            rows = group.rows(model.config) if group.rows else None
            # Channels that share a row share a scale.
            table = torch.empty(max(4 * channels, 1), dtype=torch.float64).uniform_(0.2, 5.0, generator=generator)
            scale = table[:channels] if rows is None else table[rows]
            if group.activation:
                replace_module(
                    block, group.prev, ScaledActivation(block.get_submodule(group.prev), channels, torch.float64)
                )
            fold_scale(block.get_submodule(group.prev), linears, scale, rows)


def _logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(3, 3 + 2 * 12).reshape(2, 12) % VOCABULARY
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


@by_name
@pytest.mark.parametrize("scale_activations", [False, True])
def test_folding_leaves_the_model_as_it_is(variant: Variant, scale_activations: bool) -> None:
    model = variant.model().double()
    before = _logits(model)
    groups = architecture_of(model.config).groups(model.config, scale_activations)
    _fold_random_scales(model, groups)
    torch.testing.assert_close(_logits(model), before, rtol=1e-9, atol=1e-9)


@by_name
def test_every_linear_is_in_one_group_or_known_to_be_unscaled(variant: Variant) -> None:
    model = variant.model()
    architecture = architecture_of(model.config)
    block = architecture.decoder_blocks(model)[0]
    architecture.check_block(block, "block 0")
    linears = {name for name, _ in named_linears(block)}
    for scale_activations in (False, True):
        groups = architecture.groups(model.config, scale_activations)
        counts = Counter(name for group in groups for name in group.linears)
        assert set(counts) <= linears
        assert set(counts.values()) == {1}
        if not scale_activations:
            assert linears - set(counts) == variant.unscaled
    assert {name for name in architecture.unclipped if any(leaf.endswith(name) for leaf in linears)}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("opt-post-norm", ScaleGroup("self_attn_layer_norm", ("fc1",))),
        ("opt-gelu", ScaleGroup("fc1", ("fc2",))),
        ("bloom-norm-residual", ScaleGroup("input_layernorm", ("self_attention.query_key_value",))),
        ("mpt-clip", next(group for group in mpt.ARCHITECTURE.scale_groups if group.rows)),
    ],
)
def test_a_group_that_is_not_exact_is_caught(name: str, group: ScaleGroup) -> None:
    """The equivalence test can fail: these are the groups `when` keeps out."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    model = variant.model().double()
    before = _logits(model)
    _fold_random_scales(model, [group])
    assert (_logits(model) - before).abs().max() > 1e-3


def test_value_rows_are_those_of_v() -> None:
    """Zeroing the declared V rows of a fused projection silences attention, and no other rows do."""
    for variant in VARIANTS:
        model = variant.model().double()
        architecture = architecture_of(model.config)
        group = next((group for group in architecture.scale_groups if group.rows), None)
        if group is None or group.prev.endswith("v_proj"):
            continue
        block = architecture.decoder_blocks(model)[0]
        fused, output = block.get_submodule(group.prev), block.get_submodule(group.linears[0])
        rows = group.rows(model.config)
        assert rows.shape == (output.in_features,)
        seen: list[Tensor] = []
        handle = output.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            fused.weight[rows] = 0
            if fused.bias is not None:
                fused.bias[rows] = 0
        _logits(model)
        handle.remove()
        assert seen[0].abs().max() == 0, variant.name


def test_unknown_family() -> None:
    with pytest.raises(ArchitectureError, match=r"'bert' are not supported.*bloom.*falcon.*gptj.*llama.*mpt.*opt"):
        architecture_of(BertConfig())


def test_unknown_linear_in_a_known_family() -> None:
    model = VARIANTS[0].model()
    architecture = architecture_of(model.config)
    block = architecture.decoder_blocks(model)[0]
    block.mlp.extra_proj = nn.Linear(4, 4)
    with pytest.raises(ArchitectureError, match=r"block 0 .*mlp\.extra_proj"):
        architecture.check_block(block, "block 0")


def test_no_model_type_is_claimed_twice() -> None:
    counts = Counter(name for architecture in all_architectures() for name in architecture.model_types)
    assert set(counts.values()) == {1}
    assert {"llama", "mistral", "qwen2", "opt", "bloom", "mpt", "falcon", "gptj"} <= set(counts)
