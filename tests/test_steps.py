"""Recorded decoding steps, on the CPU: the same tokens, and every way out of them."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Variant, quantized, variant
from test_block import WAYS, WINDOW, Multiplied, blocks, generate, prompt, with_context
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, masking_utils

from autoq import AutoQForCausalLM, block_ops
from autoq.nn import block as fused
from autoq.nn import steps as recorded_steps
from autoq.nn.block import unfuse_blocks
from autoq.nn.cache import KVLayer
from autoq.nn.recording import HostRecording
from autoq.nn.steps import RecordedSteps

LLAMA = variant("llama-gqa")


class Recorded(HostRecording):
    count = 0  # of recordings made
    replays = 0  # of all of them

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Recorded.count += 1

    def replay(self) -> Tensor:
        Recorded.replays += 1
        return super().replay()


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", Recorded)
    Recorded.count = Recorded.replays = 0


def pair(family: Variant, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same quantized model without recording, and with it."""
    recorded = quantized(with_context(family, 512), **settings).model
    plain = copy.deepcopy(recorded)
    del plain.forward
    assert isinstance(recorded.forward, RecordedSteps)
    return plain, recorded


def steps() -> int:
    """Replayed so far."""
    return Recorded.replays


# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*VARIANTS, WINDOW], ids=lambda family: family.name)
def test_generation_gives_the_same_tokens(family: Variant) -> None:
    plain, recorded = pair(family)
    for padded in (False, True):
        inputs = prompt(3, 12) if padded else {"input_ids": prompt(3, 12)["input_ids"]}
        before = steps()
        options = {"do_sample": False, "use_cache": True}
        assert torch.equal(generate(plain, inputs, **options), generate(recorded, inputs, **options))
        # All but the prompt; where a family has to be given a mask, one step finds that out.
        assert steps() - before in (18, 19)


@pytest.mark.parametrize("family", [LLAMA, WINDOW], ids=lambda family: family.name)
def test_masks_that_say_no_more_than_the_length_are_dropped(family: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers makes them while a stream is captured, where it may not look at any value."""
    plain, recorded = pair(family)
    given = []

    @torch.no_grad()
    def decode(model: PreTrainedModel) -> list[Tensor]:
        output = model(prompt(2, 12)["input_ids"], use_cache=True)
        logits = [output.logits[:, -1]]
        for _ in range(8):
            ids = logits[-1].argmax(-1, keepdim=True)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
        return logits

    def noting(*arguments: Any) -> Tensor:
        if arguments[-1] is not None:  # the length
            given.append(arguments[8])  # the mask
        return block_ops.decoder_blocks(*arguments)

    expected = decode(plain)
    monkeypatch.setattr(fused, "decoder_blocks", noting)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: tensor is not None)
    torch.testing.assert_close(torch.stack(decode(recorded)), torch.stack(expected))
    assert given
    assert all((mask is None) == (family is LLAMA) for mask in given)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way: str) -> None:
    plain, recorded = pair(LLAMA)
    inputs = prompt(3, 12)
    assert torch.equal(generate(plain, inputs, **WAYS[way]), generate(recorded, inputs, **WAYS[way]))
    assert (steps() > 0) == (way != "no cache")


def decode(model: PreTrainedModel, ids: Tensor, first: int = 5, **options: Any) -> Tensor:
    """The logits of all tokens, the first at once and the others one by one."""
    cache = DynamicCache(config=model.config)
    found = []
    with torch.no_grad():
        for part in (ids[:, :first], *ids[:, first:].split(1, 1)):
            found.append(model(part, past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", VARIANTS, ids=lambda family: family.name)
def test_all_blocks_are_one_call(family: Variant) -> None:
    _, recorded = pair(family)
    generate(recorded, prompt(2, 6), do_sample=False, use_cache=True)
    (slot,) = recorded.forward._slots
    for step in slot.recordings.values():
        calls = [each.function for each in step.recording._steps if isinstance(each.function, block_ops.KeptBlocks)]
        assert [call.count for call in calls] == [len(blocks(recorded))]
        functions = {each.function for each in step.recording._steps}
        is_llama = family.name.startswith(("llama", "mistral", "qwen"))
        assert (torch.ops.autoq.norm.default in functions) == is_llama
        assert (torch.ops.autoq.rotary_tables.default in functions) >= is_llama


def test_a_draft_that_leaves_early() -> None:
    """Its cache has fewer layers than the model's, of which one is free."""
    plain, recorded = pair(LLAMA)
    inputs = prompt(1, 6)
    generate(recorded, inputs, do_sample=False)
    options = {"do_sample": False, "assistant_early_exit": 1}
    assert torch.equal(generate(recorded, inputs, **options), generate(plain, inputs, **options))


def test_logits_are_those_of_the_blocks_alone() -> None:
    for family in (LLAMA, variant("gptj"), variant("bloom")):
        plain, recorded = pair(family)
        ids = prompt(2, 20)["input_ids"]
        torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-6, atol=1e-6)
        assert steps() > 0


def test_a_cache_grows_and_recordings_follow() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 300)["input_ids"]
    torch.testing.assert_close(decode(recorded, ids, 250), decode(plain, ids, 250), rtol=1e-6, atol=1e-6)
    assert Recorded.count == 2  # 256 tokens, then 512
    # The larger room serves the next cache too.
    torch.testing.assert_close(decode(recorded, ids, 250), decode(plain, ids, 250), rtol=1e-6, atol=1e-6)
    assert Recorded.count == 2


def test_recordings_are_used_again_and_kept_apart() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(2, 20)["input_ids"]
    for _ in range(3):
        generate(recorded, {"input_ids": ids}, do_sample=False)
    assert Recorded.count == 1
    # Two caches alive at once have a recording each, and do not see each other's tokens.
    caches = [DynamicCache(config=recorded.config) for _ in range(2)]
    other = ids.flip(1)
    with torch.no_grad():
        for part, turned in zip(ids.split(4, 1), other.split(4, 1), strict=True):
            for piece, piece_turned in zip(part.split(1, 1), turned.split(1, 1), strict=True):
                logits = recorded(piece, past_key_values=caches[0]).logits
                turned_logits = recorded(piece_turned, past_key_values=caches[1]).logits
    assert Recorded.count == 1 + 2  # which are given no positions, as generate does
    torch.testing.assert_close(logits[:, 0], plain(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned_logits[:, 0], plain(other).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_large_caches_do_not_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorded = pair(LLAMA)
    expected = generate(recorded, prompt(1, 5), do_sample=False)
    generate(recorded, prompt(1, 5), do_sample=False)
    assert Recorded.count == 1
    monkeypatch.setattr(recorded_steps, "idle_limit", lambda _: 0)
    assert torch.equal(generate(recorded, prompt(1, 5), do_sample=False), expected)
    assert Recorded.count == 2


def test_logits_and_keys_stay_what_they_were() -> None:
    """What a caller keeps is not filled again by the steps to come."""
    _, recorded = pair(LLAMA)
    ids = prompt(1, 12)["input_ids"]
    cache = DynamicCache(config=recorded.config)
    with torch.no_grad():
        recorded(ids[:, :5], past_key_values=cache)
        first = recorded(ids[:, 5:6], past_key_values=cache).logits
        keys = cache.layers[0].keys
        kept = first.clone(), keys.clone()
        address = cache.layers[0].lend().keys.data_ptr()
        cache = DynamicCache(config=recorded.config)
        for part in ids.flip(1).split(1, 1):
            recorded(part, past_key_values=cache)
    assert cache.layers[0].lend().keys.data_ptr() == address
    assert Recorded.count == 1
    assert torch.equal(first, kept[0])
    assert torch.equal(keys, kept[1])


def test_cropping_selecting_and_repeating_sequences() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(2, 12)["input_ids"]
    results = []
    for model in (plain, recorded):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            for i in (6, 7, 8):
                model(ids[:, i : i + 1], past_key_values=cache)
            cache.crop(-2)
            found = [model(ids[:, 7:8], past_key_values=cache).logits]
            cache.batch_repeat_interleave(2)
            found.append(model(ids[[0, 0, 1, 1], 8:9], past_key_values=cache).logits)
            cache.batch_select_indices(torch.tensor([2]))
            found += [model(ids[1:, i : i + 1], past_key_values=cache).logits for i in (9, 10)]
            found.append(model(ids[1:, 9:11], past_key_values=cache).logits)  # not a step
            found.append(model(ids[1:, 11:12], past_key_values=cache).logits)
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_keys_and_values_of_8_bits(tmp_path: Path) -> None:
    quantized(LLAMA).save_quantized(tmp_path)
    model = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu", kv_cache_bits=8).model
    plain = copy.deepcopy(model)
    del plain.forward
    ids = prompt(2, 30)["input_ids"]
    torch.testing.assert_close(decode(model, ids), decode(plain, ids), rtol=1e-6, atol=1e-6)
    assert steps() > 20


@pytest.mark.parametrize("name", ["llama-gqa", "bloom", "mpt", "gptj"])
def test_threads_generate_at_the_same_time(name: str) -> None:
    plain, recorded = pair(variant(name))
    options = {"do_sample": False, "use_cache": True}
    prompts = [{"input_ids": prompt(1, 9 + i)["input_ids"] + i} for i in range(8)]
    expected = [generate(plain, each, **options) for each in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = pool.map(lambda each: generate(recorded, each, **options), prompts)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
    assert steps() > 0


def test_beams_stay_in_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorded = pair(LLAMA)
    moved: list[KVLayer] = []
    with monkeypatch.context() as patch:
        patch.setattr(KVLayer, "move_to", lambda layer, _: moved.append(layer))
        generate(recorded, prompt(2, 12), do_sample=False, num_beams=3)
    assert Recorded.count == 1
    assert not moved
    cache = DynamicCache(config=recorded.config)
    ids = prompt(2, 12)["input_ids"]
    with torch.no_grad():
        for part in ids.split(1, 1)[:6]:
            recorded(part.repeat_interleave(3, 0), past_key_values=cache)
    kept = cache.layers[0].keys.clone()
    order = torch.tensor([5, 5, 0, 1, 2, 0])
    address = cache.layers[0]._buffers.keys.data_ptr()
    cache.reorder_cache(order)
    assert cache.layers[0]._buffers.keys.data_ptr() == address
    assert torch.equal(cache.layers[0].keys, kept[order])


# ---- the model's own forward -----------------------------------------------------------------------------------------


def eager(recorded: PreTrainedModel, plain: PreTrainedModel, **options: Any) -> None:
    """Gives the same as without recordings, and replays none, but for the step that finds that the model changed."""
    before = steps()
    ids = prompt(1, 9)["input_ids"]
    torch.testing.assert_close(decode(recorded, ids, **options), decode(plain, ids, **options), rtol=1e-5, atol=1e-5)
    assert steps() <= before + 1


def test_what_is_asked_for_beside_logits_comes_from_the_model() -> None:
    plain, recorded = pair(LLAMA)
    eager(recorded, plain, output_hidden_states=True)
    eager(recorded, plain, output_attentions=True)
    cache = DynamicCache(config=recorded.config)
    ids = prompt(1, 9)["input_ids"]
    with torch.no_grad():
        recorded(ids[:, :8], past_key_values=cache)
        assert isinstance(recorded(ids[:, 8:], past_key_values=cache, return_dict=False), tuple)
        assert recorded(ids[:, 8:], past_key_values=cache, labels=ids[:, 8:]).loss is not None
    assert Recorded.count == 0


def test_hooks_are_obeyed() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 30)["input_ids"]
    decode(recorded, ids)
    assert steps() > 0
    for place in (recorded.lm_head, recorded.model.norm, recorded.model, blocks(recorded)[1], blocks(recorded)[0].mlp):
        seen: list[nn.Module] = []
        hook = place.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        eager(recorded, plain)
        assert len(seen) == 5
        hook.remove()
        before = steps()
        decode(recorded, ids)
        assert steps() > before


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.scales"])
def test_changed_tensors_are_used(name: str) -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 20)["input_ids"]
    decode(recorded, ids)
    parent, _, leaf = name.rpartition(".")
    for way in ("in place", "assigned", "data"):
        for model in (plain, recorded):
            module = model.get_submodule(parent)
            old = getattr(module, leaf)
            with torch.no_grad():
                if way == "in place":
                    old.mul_(1.25)
                elif way == "data":
                    old.data = old.data * 1.25
                else:
                    setattr(module, leaf, nn.Parameter(old * 1.25) if isinstance(old, nn.Parameter) else old * 1.25)
        before = steps()
        torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)
        assert steps() > before


def test_a_replaced_module_is_used() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 9)["input_ids"]
    decode(recorded, ids)
    for model in (plain, recorded):
        model.lm_head = Multiplied(model.lm_head, 2.0)
    torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)


def test_gradients_training_and_autocast_run_eagerly() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 9)["input_ids"]
    cache = DynamicCache(config=recorded.config)
    recorded(ids[:, :8], past_key_values=cache)
    assert recorded(ids[:, 8:], past_key_values=cache).logits.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        eager(recorded, plain)
    recorded.train(), plain.train()
    eager(recorded, plain)
    assert Recorded.count == 0


def test_blocks_that_are_not_fused_are_not_recorded() -> None:
    plain, recorded = pair(LLAMA)
    unfuse_blocks(recorded)
    eager(recorded, plain)
    plain, recorded = pair(LLAMA)
    recorded.lm_head.train()
    eager(recorded, plain)
    assert Recorded.count == 0


def test_a_changed_config_is_noticed() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 9)["input_ids"]
    decode(recorded, ids)
    before = steps()
    for model in (plain, recorded):
        model.config.num_hidden_layers = 1
    torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)
    assert steps() > before


def test_modules_of_others_are_not_recorded() -> None:
    """They may have switches, as adapters do, which are no tensors."""
    plain, recorded = pair(LLAMA)
    for model in (plain, recorded):
        model.lm_head = Multiplied(model.lm_head, 1.0)
    for factor in (1.0, 2.0):
        for model in (plain, recorded):
            model.lm_head.factor = factor
        eager(recorded, plain)
    assert Recorded.count == 0


def test_a_model_on_several_devices_is_not_recorded() -> None:
    plain, recorded = pair(LLAMA)
    recorded.register_buffer("elsewhere", torch.empty(1, device="meta"))
    eager(recorded, plain)
    assert Recorded.count == 0


def test_a_recording_that_fails_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, recorded = pair(LLAMA)
    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", fail)
    with pytest.warns(UserWarning, match="stream is capturing"):
        eager(recorded, plain)


def test_a_recording_that_fails_once_is_tried_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [RuntimeError("out of memory")]

    def fail_once(*arguments: Any) -> Recorded:
        if failures:
            raise failures.pop()
        return Recorded(*arguments)

    plain, recorded = pair(LLAMA)
    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", fail_once)
    ids = prompt(1, 9)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)
    assert steps() > 0


def test_a_step_that_cannot_be_recorded_says_why() -> None:
    class Asking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(x.isfinite().all())

    Asking.__module__ = "transformers.asking"
    plain, recorded = pair(LLAMA)
    for model in (plain, recorded):
        model.lm_head.__class__ = Asking
    with pytest.warns(UserWarning, match="not recorded.*looks at the values of a tensor"):
        eager(recorded, plain)
    assert Recorded.count == 0


def test_other_caches_run_eagerly() -> None:
    plain, recorded = pair(LLAMA)
    options = {"do_sample": False, "cache_implementation": "static"}
    assert torch.equal(generate(plain, prompt(2, 12), **options), generate(recorded, prompt(2, 12), **options))
    assert steps() == 0


def test_inference_mode_and_back() -> None:
    plain, recorded = pair(LLAMA)
    ids = prompt(1, 20)["input_ids"]
    with torch.inference_mode():
        decode(recorded, ids)
    torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(decode(recorded, ids), decode(plain, ids), rtol=1e-5, atol=1e-5)
    assert Recorded.count == 1


# ---- the model stays a model -----------------------------------------------------------------------------------------


def test_copies_and_pickles_record_for_themselves(tmp_path: Path) -> None:
    _, recorded = pair(LLAMA)
    ids = prompt(1, 12)["input_ids"]
    expected = decode(recorded, ids)
    torch.save(recorded, tmp_path / "model.pt")
    for again in (copy.deepcopy(recorded), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(decode(again, ids), expected)
        assert steps() > 0
        with torch.no_grad():
            again.lm_head.weight.mul_(2)
        assert not torch.equal(decode(again, ids), expected)
    assert torch.equal(decode(recorded, ids), expected)


def test_compiled_models_are_one_graph() -> None:
    """Fused or not: what torch.compile sees is transformers' forward."""
    plain, recorded = pair(LLAMA)
    unfuse_blocks(plain)
    ids = prompt(2, 5)["input_ids"]
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        for model in (plain, recorded):
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_signature_is_the_models() -> None:
    plain, recorded = pair(LLAMA)
    assert inspect.signature(recorded.forward) == inspect.signature(plain.forward)


def test_a_model_is_gone_with_its_last_reference() -> None:
    _, recorded = pair(LLAMA)
    decode(recorded, prompt(1, 9)["input_ids"])
    lm_head = weakref.ref(recorded.lm_head)
    gc.collect()
    gc.disable()
    try:
        del recorded
        assert lm_head() is None
    finally:
        gc.enable()
