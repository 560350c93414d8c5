"""Fused decoder blocks and recorded steps on a GPU. tests/test_cuda_host_block.py runs the kernels without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, Variant, quantized, variant
from test_block import (
    KINDS,
    WAYS,
    WINDOW,
    arguments,
    blocks,
    error,
    exact_logits,
    generate,
    prompt,
    with_context,
    with_quantized_cache,
)
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedModel

from autoq import block_ops, model_ops
from autoq.architectures.base import NormKind
from autoq.nn.block import FusedForward
from autoq.nn.steps import RecordedSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}  # fp32 linears may use TF32
FLOATS = tuple(TOLERANCE)


def on_gpu(given: list[Any]) -> list[Any]:
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, given)


def check(given: list[Any], tolerance: float) -> None:
    wanted, ours = copy.deepcopy(given), on_gpu(given)
    held = int(given[13]) if len(given) > 13 else given[5]
    expected = block_ops.reference_decoder_blocks(*wanted)
    output = block_ops.decoder_blocks(*ours)
    torch.testing.assert_close(output.cpu(), expected, rtol=tolerance, atol=tolerance)
    new = slice(held, held + given[0].shape[1])
    for place in (1, 2):
        found, right, before = ours[place][0].cpu(), wanted[place][0], given[place][0]
        if found.dtype == torch.int8:
            assert int((found.int() - right.int()).abs().max()) <= 1  # ties
            continue
        torch.testing.assert_close(found[:, :, new], right[:, :, new], rtol=tolerance, atol=tolerance)
        for part in (slice(0, new.start), slice(new.stop, None)):
            assert torch.equal(found[:, :, part], before[:, :, part])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 21])
def test_native_matches_the_reference(changes: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    given = arguments(tokens, dtype=dtype, **changes)
    check(given, TOLERANCE[dtype])
    given[8] = None
    check(given, TOLERANCE[dtype])
    given[9] = None
    check(given, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_a_cache_of_8_bits(tokens: int) -> None:
    given = with_quantized_cache(arguments(tokens, dtype=torch.float16))
    check(given, TOLERANCE[torch.float16])


@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_a_length_on_the_device(tokens: int) -> None:
    for length in (0, 2, 4):
        check([*arguments(tokens, dtype=torch.float16), torch.tensor(length)], TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_around_the_blocks(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 129).to(dtype), torch.randn(129).to(dtype)
    found = model_ops.norm(x.cuda(), weight.cuda(), None, NormKind.RMS, 1e-5)
    expected = model_ops.reference_norm(x, weight, None, NormKind.RMS, 1e-5)
    torch.testing.assert_close(found.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    positions, frequencies = torch.randint(0, 131072, (2, 40)), 10000.0 ** (-torch.arange(32) / 32)
    tables = model_ops.rotary_tables(positions.cuda(), frequencies.cuda(), 1.25, dtype)
    for ours, right in zip(tables, model_ops.reference_rotary_tables(positions, frequencies, 1.25, dtype), strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_opcheck() -> None:
    given = on_gpu([*arguments(), torch.tensor(3)])
    torch.library.opcheck(block_ops.decoder_blocks, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("family", VARIANTS, ids=lambda family: family.name)
def test_models_agree_with_float64(family: Variant) -> None:
    family = with_context(family, 512)
    model = quantized(family, dtype=torch.float16, scale_activations=True).model
    assert all(isinstance(block.__dict__["forward"], FusedForward) for block in blocks(model))
    for batch, tokens in ((1, 1), (3, 7), (2, 128)):
        inputs = prompt(batch, tokens)
        exact = exact_logits(model, inputs)
        ours = copy.deepcopy(model).cuda()
        moved = {name: value.cuda() for name, value in inputs.items()}
        with torch.no_grad():
            logits = ours(**moved).logits.cpu()
        assert error(_Fixed(logits), inputs, exact) < 1e-2


class _Fixed:
    """A model whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **_: Any) -> _Fixed:
        return self


# ---- recorded steps --------------------------------------------------------------------------------------------------


def pair(family: Variant) -> tuple[PreTrainedModel, PreTrainedModel]:
    """In fp32: attention is cut into other parts in a graph, whose size is that of the room, and rounded otherwise."""
    recorded = quantized(with_context(family, 512)).model.cuda()
    plain = copy.deepcopy(recorded)
    del plain.forward
    assert isinstance(recorded.forward, RecordedSteps)
    return plain, recorded


def recordings(model: PreTrainedModel) -> int:
    return sum(len(slot.recordings) for slot in model.forward._slots)


@pytest.mark.parametrize("family", [*FAMILIES, WINDOW, variant("falcon-sequential")], ids=lambda family: family.name)
def test_generation_with_graphs_is_that_without(family: Variant) -> None:
    plain, recorded = pair(family)
    for inputs in (prompt(3, 12), {"input_ids": prompt(3, 12)["input_ids"]}):
        moved = {name: value.cuda() for name, value in inputs.items()}
        options = {"do_sample": False, "use_cache": True}
        assert torch.equal(generate(plain, moved, **options), generate(recorded, moved, **options))
    assert recordings(recorded) > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way: str) -> None:
    plain, recorded = pair(variant("llama-gqa"))
    moved = {name: value.cuda() for name, value in prompt(3, 12).items()}
    torch.cuda.manual_seed(0)
    expected = generate(plain, moved, **WAYS[way])
    torch.cuda.manual_seed(0)
    assert torch.equal(generate(recorded, moved, **WAYS[way]), expected)


def test_a_cache_grows_and_graphs_follow() -> None:
    plain, recorded = pair(variant("llama-gqa"))
    ids = prompt(2, 300)["input_ids"].cuda()
    results = []
    for model in (plain, recorded):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            found = [model(part, past_key_values=cache).logits for part in (ids[:, :250], *ids[:, 250:].split(1, 1))]
        results.append(torch.cat(found, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_changed_weights_are_used_and_moved_models_run() -> None:
    plain, recorded = pair(variant("llama-gqa"))
    moved = {name: value.cuda() for name, value in prompt(1, 12).items()}
    generate(recorded, moved, do_sample=False)
    for model in (plain, recorded):
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
    assert torch.equal(generate(recorded, moved, do_sample=False), generate(plain, moved, do_sample=False))
    recorded.cpu().cuda()
    assert torch.equal(generate(recorded, moved, do_sample=False), generate(plain, moved, do_sample=False))


def test_steps_do_not_wait_for_the_gpu() -> None:
    _, recorded = pair(variant("llama-gqa"))
    ids = prompt(2, 12)["input_ids"].cuda()
    cache = DynamicCache(config=recorded.config)
    with torch.no_grad():
        for part in ids.split(1, 1)[:4]:
            recorded(part, past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for part in ids.split(1, 1)[4:]:
                recorded(part, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
