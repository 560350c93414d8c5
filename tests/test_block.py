"""Fused decoder blocks: the same numbers and the same tokens as transformers' own, on every kind of call."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, VOCABULARY, Variant, quantized
from operators import needs_extension
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, PreTrainedModel

from autoq import AutoQForCausalLM, block_ops, ops
from autoq.architectures import architecture_of
from autoq.errors import ConfigError
from autoq.extension import extension_missing
from autoq.nn import QuantLinear, block, steps
from autoq.nn.block import FusedForward, fuse_blocks, unfuse_blocks
from autoq.nn.cache import KVLayer
from autoq.nn.linear import DenseLinear, replace_module
from autoq.packed import PackedWeight
from autoq.quantization.weight import quantize


def pair(variant: Variant, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A quantized model, unfused and fused."""
    fused = quantized(variant, **settings).model
    unfused = copy.deepcopy(fused)
    unfuse_blocks(unfused)
    assert all(isinstance(b.__dict__["forward"], FusedForward) for b in blocks(fused))
    return unfused, fused


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    return architecture_of(model.config).decoder_blocks(model)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, dense and in float64."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            weight = ops.dequantize(module.packed(), module.spec.bits, module.out_features, module.in_features)
            dense.weight = nn.Parameter(weight.double(), requires_grad=False)
            dense.bias = None if module.bias is None else nn.Parameter(module.bias.double(), requires_grad=False)
            replace_module(model, name, dense)
    return model.double()


def prompt(batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; of several sequences, each but the first is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(min(batch, tokens)):
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_context(variant: Variant, length: int) -> Variant:
    config = copy.deepcopy(variant.config)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if hasattr(config, name):
            setattr(config, name, length)
    return Variant(variant.name, config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the fused operator, which recorded steps would not make one by one."""
    monkeypatch.setattr(steps, "RECORDERS", {})
    counted = [0]
    operator = block.decoder_blocks

    def count(*arguments: Any) -> Tensor:
        counted[0] += 1
        return operator(*arguments)

    monkeypatch.setattr(block, "decoder_blocks", count)
    return counted


# ---- numbers -------------------------------------------------------------------------------------------------------


def exact_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of each sequence, without its padding, in float64."""
    model = in_float64(model)
    with torch.no_grad():
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [model(ids[mask.bool()][None]).logits[0] for ids, mask in rows]


def error(model: PreTrainedModel, inputs: dict[str, Tensor], exact: list[Tensor]) -> float:
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    kept = [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]
    return float((torch.cat(kept) - torch.cat(exact)).norm() / torch.cat(exact).norm())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_fused_agrees_with_float64_as_unfused_does(variant: Variant, calls: list[int]) -> None:
    variant = with_context(variant, 512)
    for dtype, bound in ((torch.float32, 4e-6), (torch.bfloat16, 4e-2)):
        unfused, fused = pair(variant, dtype=dtype, scale_activations=True)
        for batch, tokens in ((1, 1), (1, 7), (1, 128), (1, 500), (5, 1), (5, 7), (5, 128), (5, 500)):
            inputs = prompt(batch, tokens)
            calls[0] = 0
            exact = exact_logits(unfused, inputs)
            ours, theirs = error(fused, inputs, exact), error(unfused, inputs, exact)
            assert calls[0] == 2
            assert ours < bound
            assert ours < 1.6 * theirs + 2e-6, (dtype, batch, tokens)


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_the_head_goes_with_the_blocks(variant: Variant) -> None:
    """Unless it is quantized."""
    unfused, fused = pair(variant)
    own, head = unfused.lm_head, fused.lm_head
    assert (type(own), type(head)) == (nn.Linear, DenseLinear)
    inputs = torch.randn(2, 1, head.in_features)
    with torch.no_grad():
        torch.testing.assert_close(head(inputs), own(inputs))
    assert type(quantized(variant, lm_head_bits=8).model.lm_head) is QuantLinear


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_every_instruction_set(variant: Variant, capability: str) -> None:
    for dtype, bound in ((torch.float32, 4e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        fused = quantized(variant, dtype=dtype, scale_activations=True).model
        inputs = prompt(3, 20)
        assert error(fused, inputs, exact_logits(fused, inputs)) < bound, dtype


def arguments(
    tokens: int = 3, past: int = 4, head_dim: int = 24, dtype: torch.dtype = torch.float32,
    width: int = 64, inner: int = 80, seed: int = 1, **changes: Any,
) -> list[Any]:  # fmt: skip
    """Of a Llama-like block with grouped heads, whose sizes are multiples of nothing convenient."""
    torch.manual_seed(seed)
    layout = changes.get("heads") or block_ops.HeadLayout.consecutive(4, 2, head_dim)

    def linear(out_features: int, in_features: int) -> list[Tensor]:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        packed = QuantLinear.from_weight(quantize(weight, 4, 16)).packed()
        return [*packed, torch.randn(out_features, dtype=dtype)]

    tensors = block_ops.BlockTensors(
        torch.rand(width, dtype=dtype), torch.empty(0), *linear(layout.row_size, width),
        *linear(width, layout.heads * head_dim), torch.rand(width, dtype=dtype), torch.rand(width, dtype=dtype),
        *linear(2 * inner, width), *linear(width, inner), torch.rand(inner, dtype=dtype) + 0.5,
        torch.rand(head_dim, dtype=dtype), torch.rand(head_dim, dtype=dtype),
    )  # fmt: skip
    chosen = {
        "heads": layout, "arrangement": block_ops.Arrangement.SEQUENTIAL, "norm": block_ops.NormKind.LAYER,
        "activation": block_ops.ActivationKind.SILU, "gated": True, "intermediate": inner,
        "rotary": block_ops.RotaryKind.HALVES, "inverted_mask": False, "bits": (4, 4, 4, 4), "int8": False,
        "epsilons": (1e-5, 1e-5, 1e-6), "scale": 0.2, "clip": 2.0, **changes,
    }  # fmt: skip
    settings = block_ops.BlockSettings(**chosen)
    caches = [torch.randn(2, layout.kv_heads, past + tokens + 5, head_dim, dtype=dtype) for _ in range(2)]
    angles = head_dim // 2 if settings.rotary == block_ops.RotaryKind.HALVES else head_dim // 4
    tables = [torch.randn(1, tokens, angles, dtype=dtype) for _ in range(2)]
    if settings.rotary == block_ops.RotaryKind.NONE:
        tables = [None, None]
    mask = torch.rand(2, 1, tokens, past + tokens) > 0.3
    bias = torch.randn(1, layout.heads, 1, past + tokens)
    hidden = torch.randn(2, tokens, width, dtype=dtype)
    return [
        hidden,
        *([cache] for cache in caches),
        [],
        [],
        past,
        *tables,
        mask,
        bias,
        list(tensors),
        settings.integers(),
        settings.constants(),
    ]


KINDS = [
    *({"activation": kind} for kind in block_ops.ActivationKind),
    *({"arrangement": arrangement} for arrangement in block_ops.Arrangement),
    *({"rotary": rotary} for rotary in block_ops.RotaryKind),
    *({"norm": norm} for norm in block_ops.NormKind),
    {"inverted_mask": True},
    {"clip": 0.0},
    {"heads": block_ops.HeadLayout.interleaved(4, 2, 24)},
]


def with_quantized_cache(given: list[Any]) -> list[Any]:
    for place in (1, 2):
        (states,) = given[place]
        cache, scales = torch.empty_like(states, dtype=torch.int8), torch.empty(states.shape[:3])
        block_ops.write_cache(cache, scales, 0, states)
        given[place], given[place + 2] = [cache], [scales]
    return given


@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_a_cache_of_8_bits_matches_the_reference(tokens: int, capability: str) -> None:
    given = with_quantized_cache(arguments(tokens))
    if tokens == 21:
        given[9] = None  # torch's attention
    ours, wanted = copy.deepcopy(given), copy.deepcopy(given)
    output = block_ops.decoder_blocks(*ours)
    expected = block_ops.reference_decoder_blocks(*wanted)
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
    for place in (1, 2):
        assert int((ours[place][0].int() - wanted[place][0].int()).abs().max()) <= 1  # ties
        torch.testing.assert_close(ours[place + 2], wanted[place + 2])


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_native_matches_the_reference(changes: dict[str, Any], tokens: int, capability: str) -> None:
    given = arguments(tokens, **changes)
    ours, wanted = copy.deepcopy(given), copy.deepcopy(given)
    output = block_ops.decoder_blocks(*ours)
    expected = block_ops.reference_decoder_blocks(*wanted)
    torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)
    for place in (1, 2):  # the caches: new positions written, all others left alone
        (found,), (right,), (before,) = ours[place], wanted[place], given[place]
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-5)
        assert torch.equal(found[:, :, :4], before[:, :, :4])
        assert torch.equal(found[:, :, 4 + tokens :], before[:, :, 4 + tokens :])


@pytest.mark.parametrize("tokens", [40, 150])
def test_prompts_that_look_back_match_the_reference(tokens: int, capability: str) -> None:
    given = arguments(tokens, head_dim=40, past=3)
    given[8:10] = [None, None]
    ours, wanted = copy.deepcopy(given), copy.deepcopy(given)
    expected = block_ops.reference_decoder_blocks(*wanted)
    torch.testing.assert_close(block_ops.decoder_blocks(*ours), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_several_blocks_in_a_call_are_one_after_the_other(tokens: int, eight_bits: bool) -> None:
    first, second = arguments(tokens), arguments(tokens, seed=2, activation=block_ops.ActivationKind.GELU, clip=0.0)
    if eight_bits:
        first, second = with_quantized_cache(first), with_quantized_cache(second)
    both = copy.deepcopy(first)
    for i in (1, 2, 3, 4, 10, 11, 12):
        both[i] = [*both[i], *copy.deepcopy(second[i])]
    wanted = copy.deepcopy(both)
    second[5:10] = first[5:10]
    second[0] = block_ops.decoder_blocks(*first)
    assert torch.equal(block_ops.decoder_blocks(*both), block_ops.decoder_blocks(*second))
    for place in (1, 2, 3, 4):
        for ours, alone in zip(both[place], [*first[place], *second[place]], strict=True):
            assert torch.equal(ours, alone)
    expected = block_ops.reference_decoder_blocks(*wanted)
    tolerance = 2e-3 if eight_bits else 2e-5
    torch.testing.assert_close(block_ops.decoder_blocks(*copy.deepcopy(both)), expected, rtol=tolerance, atol=tolerance)


@needs_extension
def test_kept_blocks_give_what_the_operator_gives() -> None:
    first, second = arguments(tokens=1), arguments(tokens=1, seed=2, activation=block_ops.ActivationKind.GELU)
    both = [*first[:1], *([*first[i], *second[i]] for i in (1, 2, 3, 4)), *first[5:10]]
    both += [[*first[i], *second[i]] for i in (10, 11, 12)]
    ours, theirs = copy.deepcopy(both), copy.deepcopy(both)
    kept = block_ops.KeptBlocks(*ours)
    found, expected = [], []
    for step in range(3):
        hidden = torch.randn_like(first[0]) if step else first[0]
        found.append(kept(hidden, *block_ops.KeptBlocks.changing(ours)[1:]))
        expected.append(block_ops.decoder_blocks(hidden, *theirs[1:]))
    assert all(torch.equal(result, right) for result, right in zip(found, expected, strict=True))
    assert all(torch.equal(cache, right) for cache, right in zip(ours[1] + ours[2], theirs[1] + theirs[2], strict=True))
    with pytest.raises(RuntimeError, match="but the blocks were kept for"):
        kept(first[0].repeat(2, 1, 1), *block_ops.KeptBlocks.changing(ours)[1:])
    number = kept._number
    del kept
    with pytest.raises(RuntimeError, match="has been dropped"):
        torch.ops.autoq.kept_decoder_blocks(first[0], number, *block_ops.KeptBlocks.changing(ours)[1:])


@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 128), ((71, 1), 48)])
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_attention_in_bf16(
    tokens: int, eight_bits: bool, heads: tuple[int, int], head_dim: int, capability: str
) -> None:
    layout = block_ops.HeadLayout.consecutive(*heads, head_dim)
    given = arguments(tokens, 130, head_dim, torch.bfloat16, heads=layout)
    if eight_bits:
        given = with_quantized_cache(given)
    ours, wanted = copy.deepcopy(given), copy.deepcopy(given)
    expected = block_ops.reference_decoder_blocks(*wanted)
    torch.testing.assert_close(block_ops.decoder_blocks(*ours), expected, rtol=2e-2, atol=4e-2)


MANY_HEADS = {"dtype": torch.bfloat16, "heads": block_ops.HeadLayout.consecutive(8, 2, 24)}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 1, "width": 1024, "inner": 3008, "head_dim": 128},
        {"tokens": 1, "past": 110, **MANY_HEADS},
        pytest.param({"tokens": 20, "past": 110, **MANY_HEADS}, marks=needs_extension),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(changes: dict[str, Any], threads: Callable[[int], None]) -> None:
    given = arguments(**changes)
    if changes["tokens"] > 1:
        given[8] = None
        given[0][:, -1] = float("inf")  # in a chunk of the cache that most tokens do not look at
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        for _ in range(20):
            found.append(block_ops.decoder_blocks(*given))
    assert found[0][:, :18].isfinite().all()
    for other in found:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


def test_opcheck() -> None:
    torch.library.opcheck(block_ops.decoder_blocks, arguments(), test_utils=("test_schema", "test_faketensor"))


def test_what_a_query_must_not_see_does_not_matter() -> None:
    """Neither NaN in unused room of the cache nor in masked positions reaches the output."""
    given = arguments(tokens=1, past=6)
    given[8] = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    clean = block_ops.decoder_blocks(*copy.deepcopy(given))
    for (cache,) in given[1:3]:
        cache[:, :, 7:] = float("nan")
    torch.testing.assert_close(block_ops.decoder_blocks(*given), clean)


@needs_extension  # the reference multiplies what must not be seen by zero
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_chunk_that_must_not_be_seen_does_not_matter(tokens: int, capability: str) -> None:
    given = arguments(tokens=tokens, past=200, **MANY_HEADS)
    given[8] = torch.ones(2, 1, tokens, 200 + tokens, dtype=torch.bool)
    hidden = given[8][0, 0, 3:9] if tokens > 1 else given[8][0, 0]
    hidden[:, :128] = False
    clean = block_ops.decoder_blocks(*copy.deepcopy(given))
    given[2][0][0, :, 3:100] = float("nan")
    found = block_ops.decoder_blocks(*given)
    unaffected = slice(3, 9) if tokens > 1 else slice(None)
    assert torch.equal(found[0, unaffected], clean[0, unaffected])
    assert torch.equal(found[1], clean[1])


def test_a_query_that_may_look_nowhere_is_finite() -> None:
    for tokens in (1, 20):
        given = arguments(tokens=tokens)
        given[8] = torch.zeros(2, 1, tokens, 4 + tokens, dtype=torch.bool)
        assert block_ops.decoder_blocks(*given).isfinite().all()
        given[8] = torch.full((2, 1, tokens, 4 + tokens), torch.finfo(torch.float32).min)
        assert block_ops.decoder_blocks(*given).isfinite().all()


BAD = {
    "must be float32, bfloat16 or float16": lambda a: a.__setitem__(0, a[0].double()),
    "has room for": lambda a: a.__setitem__(5, 10),
    "keys must be contiguous and have the shape": lambda a: a.__setitem__(1, [a[1][0][:, :1]]),
    "values must be on the CPU and have the dtype": lambda a: a.__setitem__(2, [a[2][0].bfloat16()]),
    "cosines and sines must be given": lambda a: a.__setitem__(6, None),
    "cosines and sines must have the same shape": lambda a: a.__setitem__(7, a[7][..., :4].contiguous()),
    "cosines turn": lambda a: (a.__setitem__(6, torch.zeros(1, 3, 50)), a.__setitem__(7, torch.zeros(1, 3, 50))),
    "dimension 3 of mask is 3": lambda a: a.__setitem__(8, a[8][..., :3]),
    "bias must be bool, float32": lambda a: a.__setitem__(9, a[9].long()),
    "tensors, .* settings": lambda a: a[10].pop(),
    "each of 1 blocks needs keys and values": lambda a: a[2].append(a[2][0]),
    "there is no block": lambda a: (a[1].clear(), a[2].clear()),
    "both must have scales, or neither": lambda a: a[3].append(torch.empty(2, 2, 12)),
    "vector of 64 values": lambda a: a[10].__setitem__(0, torch.ones(63)),
    "head layout leaves the row": lambda a: a[11].__setitem__(5, 10_000),
    "the setting -24 is out of its range": lambda a: a[11].__setitem__(4, -24),
    "do not go together": lambda a: a[11].__setitem__(1, 3),
    "out of its range": lambda a: a[11].__setitem__(10, 99),
    "codes must have the shape": lambda a: a[10].__setitem__(2, a[10][2][:1]),
}


@needs_extension
@pytest.mark.parametrize("sentence", BAD, ids=str)
def test_wrong_arguments_get_a_sentence(sentence: str) -> None:
    given = arguments()
    BAD[sentence](given)
    with pytest.raises(RuntimeError, match=sentence):
        block_ops.decoder_blocks(*given)


def test_an_empty_batch() -> None:
    given = arguments()
    given[0], given[1], given[2] = given[0][:0], [given[1][0][:0]], [given[2][0][:0]]
    given[8] = None
    assert block_ops.decoder_blocks(*given).shape == (0, 3, 64)


# ---- generation ----------------------------------------------------------------------------------------------------

WINDOW = Variant(
    "mistral-window",
    MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=128, sliding_window=16,
    ),
)  # fmt: skip

WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "no cache": {"do_sample": False, "use_cache": False},
}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=20, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize("variant", [*FAMILIES, WINDOW], ids=lambda variant: variant.name)
def test_generation_gives_the_same_tokens(variant: Variant, calls: list[int]) -> None:
    unfused, fused = pair(variant)
    inputs = prompt(3, 12)
    for way, options in WAYS.items():
        calls[0] = 0
        assert torch.equal(generate(unfused, inputs, **options), generate(fused, inputs, **options)), way
        assert calls[0] == 2 * 20, way
    # Padded in a batch as alone.
    alone = generate(fused, {"input_ids": inputs["input_ids"][2:, 2:]}, do_sample=False)
    assert torch.equal(alone[0, -20:], generate(fused, inputs, do_sample=False)[2, -20:])


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_a_cache_is_used_again_across_turns(variant: Variant) -> None:
    unfused, fused = pair(variant)
    ids = prompt(1, 30)["input_ids"]
    with torch.no_grad():
        whole = unfused(ids).logits
        first = fused(ids[:, :12], use_cache=True)
        second = fused(ids[:, 12:13], past_key_values=first.past_key_values, use_cache=True)
        third = fused(ids[:, 13:], past_key_values=second.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_filled_in_inference_mode_goes_on_outside() -> None:
    unfused, fused = pair(FAMILIES[0])
    ids = prompt(1, 12)["input_ids"]
    cache = DynamicCache(config=fused.config)
    with torch.inference_mode():
        fused(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        rest = fused(ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(rest, unfused(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_window_with_a_watched_block() -> None:
    """A block that runs unfused and one that runs fused share a cache whose masks are made for both."""
    for watched in (0, 1):
        unfused, fused = pair(WINDOW)
        blocks(fused)[watched].mlp.register_forward_hook(lambda *_: None)
        inputs = prompt(2, 12)
        assert torch.equal(generate(unfused, inputs, do_sample=False), generate(fused, inputs, do_sample=False))


def test_a_cache_of_another_class_is_left_alone(calls: list[int]) -> None:
    class Watching(DynamicCache):
        updates = 0

        def update(self, *arguments: Any, **options: Any) -> Any:
            self.updates += 1
            return super().update(*arguments, **options)

    _, fused = pair(FAMILIES[0])
    cache = Watching()
    with torch.no_grad():
        for _ in range(3):
            fused(prompt(1, 4)["input_ids"], past_key_values=cache)
    assert (cache.updates, calls[0]) == (6, 0)


def test_a_cache_filled_unfused_goes_on_fused() -> None:
    unfused, fused = pair(FAMILIES[0])
    ids = prompt(2, 20)["input_ids"]
    cache = DynamicCache(config=fused.config)
    with torch.no_grad():
        unfused(ids[:, :9], past_key_values=cache)
        there = fused(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(there, unfused(ids).logits[:, 9:], rtol=1e-4, atol=1e-4)
        assert isinstance(cache.layers[0], KVLayer)
        back = unfused(ids[:, :1], past_key_values=cache).logits
        again = unfused(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(back, again, rtol=1e-4, atol=1e-4)


def test_assisted_generation_gives_the_same_tokens(calls: list[int]) -> None:
    unfused, fused = pair(FAMILIES[0])
    assistant = quantized(FAMILIES[0], bits=3).model
    inputs = prompt(1, 12)
    expected = generate(unfused, inputs, do_sample=False)
    assert torch.equal(generate(fused, inputs, do_sample=False, assistant_model=assistant), expected)
    assert calls[0] > 0


def test_a_context_longer_than_the_biases_is_no_silent_one() -> None:
    """MPT makes its biases for so many positions and no more."""
    fused, unfused = pair(next(variant for variant in FAMILIES if variant.name == "mpt"))
    inputs = prompt(1, fused.config.max_seq_len + 2)
    for model in (fused, unfused):
        with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
            model(**inputs)


def test_static_cache_runs_unfused(calls: list[int]) -> None:
    unfused, fused = pair(FAMILIES[0])
    options = {"do_sample": False, "cache_implementation": "static"}
    assert torch.equal(generate(unfused, prompt(2, 12), **options), generate(fused, prompt(2, 12), **options))
    assert calls[0] == 0


def test_keys_and_values_of_8_bits(tmp_path: Path) -> None:
    for variant in FAMILIES:
        quantized(variant).save_quantized(tmp_path / variant.name)
        exact = AutoQForCausalLM.from_quantized(tmp_path / variant.name, device_map="cpu")
        small = AutoQForCausalLM.from_quantized(tmp_path / variant.name, device_map="cpu", kv_cache_bits=8)
        inputs = prompt(2, 40)
        with torch.no_grad():
            wanted, found = exact(**inputs, use_cache=True), small(**inputs, use_cache=True)
            assert (found.logits - wanted.logits).norm() < 0.03 * wanted.logits.norm()
            cache = found.past_key_values
            assert cache.layers[0]._buffers.keys.dtype == torch.int8
            # What is in the cache is all that a later token sees, however it came there.
            inputs["attention_mask"] = torch.ones(2, 41, dtype=torch.int64)
            next_token = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": inputs["attention_mask"]}
            step = small(**next_token, past_key_values=cache).logits
            other = exact(**next_token, past_key_values=wanted.past_key_values).logits
            assert (step - other).norm() < 0.03 * other.norm()
        assert small.generate(**prompt(2, 12), num_beams=2, max_new_tokens=5, pad_token_id=0).shape[0] == 2
    with pytest.raises(ConfigError, match="kv_cache_bits is 4"):
        AutoQForCausalLM.from_quantized(tmp_path / variant.name, kv_cache_bits=4)


# ---- when the block's own forward is wanted ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_gradients_flow_through_the_blocks(variant: Variant, calls: list[int]) -> None:
    unfused, fused = pair(variant)
    gradients = []
    for model in (unfused, fused):
        embeddings = model.get_input_embeddings()(prompt(1, 6)["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients)
    assert calls[0] == 0


def test_attention_weights_are_there_when_asked_for(calls: list[int]) -> None:
    for variant in FAMILIES:
        config = copy.deepcopy(variant.config)
        config._attn_implementation = "eager"
        unfused, fused = pair(Variant(variant.name, config))
        with torch.no_grad():
            wanted = unfused(**prompt(1, 6), output_attentions=True).attentions
            found = fused(**prompt(1, 6), output_attentions=True).attentions
        assert len(wanted) == len(found) == 2
        torch.testing.assert_close(found, wanted)


def test_hidden_states_are_there_when_asked_for() -> None:
    unfused, fused = pair(FAMILIES[0])
    with torch.no_grad():
        wanted, found = (model(**prompt(1, 6), output_hidden_states=True).hidden_states for model in (unfused, fused))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Multiplied(nn.Module):
    """An adapter around a module, with a switch that is no tensor."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


def test_hooks_and_adapters_on_a_part_are_obeyed(calls: list[int]) -> None:
    _, fused = pair(FAMILIES[0])
    seen: list[Tensor] = []
    linear = blocks(fused)[0].mlp.down_proj
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        fused(**prompt(1, 4))
    assert (len(seen), calls[0]) == (1, 1)
    hook.remove()

    with torch.no_grad():
        before = fused(**prompt(1, 4)).logits
        blocks(fused)[0].mlp.down_proj = Multiplied(linear, 2.0)
        assert not torch.allclose(fused(**prompt(1, 4)).logits, before)
        blocks(fused)[0].mlp.down_proj = linear
        assert torch.equal(fused(**prompt(1, 4)).logits, before)


def test_one_call_that_asks_for_more_does_not_slow_the_next(calls: list[int]) -> None:
    unfused, fused = pair(FAMILIES[0])
    with torch.no_grad():
        for options in ({"output_hidden_states": True}, {}, {"output_attentions": True}, {}):
            calls[0] = 0
            torch.testing.assert_close(
                fused(**prompt(1, 6), **options).logits, unfused(**prompt(1, 6)).logits, rtol=1e-4, atol=1e-4
            )
            assert calls[0] == (0 if "output_attentions" in options else 2), options


def test_a_forward_or_a_hook_of_somebody_else_is_obeyed(calls: list[int]) -> None:
    _, fused = pair(FAMILIES[0])
    linear = blocks(fused)[0].mlp.down_proj
    own = linear.forward
    with torch.no_grad():
        before = fused(**prompt(1, 4)).logits
        linear.forward = lambda x: 2 * own(x)
        assert not torch.allclose(fused(**prompt(1, 4)).logits, before)
        del linear.forward
        seen: list[nn.Module] = []
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        calls[0] = 0
        fused(**prompt(1, 4))
        hook.remove()
        assert (calls[0], linear in seen) == (0, True)
        assert torch.equal(fused(**prompt(1, 4)).logits, before)


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_runs_unfused(dtype: torch.dtype, variant: Variant, calls: list[int]) -> None:
    if dtype == torch.float16 and variant.config.model_type != "llama":
        pytest.skip("torch's layer norm takes no bf16 input with fp16 weights")
    unfused, fused = pair(variant, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(**prompt(4, 40)).logits, unfused(**prompt(4, 40)).logits)
        linear = next(each for each in blocks(fused)[0].modules() if isinstance(each, QuantLinear))
        assert linear(torch.randn(2, linear.in_features, dtype=dtype)).dtype == torch.bfloat16
    assert calls[0] == 0


def test_another_attention_runs_unfused(calls: list[int]) -> None:
    _, fused = pair(FAMILIES[0])
    fused.config._attn_implementation = "flex_attention"
    with contextlib.suppress(Exception), torch.no_grad():
        fused(**prompt(1, 4))
    assert calls[0] == 0


def test_parameters_of_a_block_get_gradients() -> None:
    _, fused = pair(FAMILIES[0])
    fused.requires_grad_(False)
    norm = blocks(fused)[0].input_layernorm
    norm.weight.requires_grad_()
    fused(**prompt(1, 4)).logits.sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("variant", FAMILIES, ids=lambda variant: variant.name)
def test_changed_tensors_are_used(variant: Variant, calls: list[int]) -> None:
    """Whatever a module holds, assigned or changed in place, is what the next call computes with."""
    unfused, fused = pair(variant)
    inputs = prompt(1, 6)
    for name, tensor in list(fused.state_dict(keep_vars=True).items()):
        if not tensor.is_floating_point() or ".0." not in name:
            continue
        parent, _, leaf = name.rpartition(".")
        for model in (unfused, fused):
            module = model.get_submodule(parent)
            with torch.no_grad():
                if leaf == "scales":
                    setattr(module, leaf, getattr(module, leaf) * 1.25)
                else:
                    getattr(module, leaf).mul_(1.25)
        with torch.no_grad():
            calls[0] = 0
            torch.testing.assert_close(fused(**inputs).logits, unfused(**inputs).logits, rtol=1e-3, atol=1e-3)
            assert calls[0] == 2, name


def test_modes_are_read_at_every_call(calls: list[int]) -> None:
    unfused, fused = pair(FAMILIES[0], dtype=torch.bfloat16)
    inputs = prompt(1, 20)
    with torch.no_grad():
        exact = fused(**inputs).logits
        for model in (unfused, fused):
            for module in model.modules():
                if isinstance(module, QuantLinear):
                    module.mode = "int8"
        changed = fused(**inputs).logits
        if extension_missing() is None:
            assert not torch.equal(changed, exact)
        blocks(fused)[0].mlp.down_proj.mode = "exact"
        calls[0] = 0
        fused(**inputs)
        assert calls[0] == 1


def test_a_model_is_gone_with_its_last_reference() -> None:
    _, fused = pair(FAMILIES[0])
    block_of_it = weakref.ref(blocks(fused)[0])
    gc.collect()
    gc.disable()
    try:
        del fused
        assert block_of_it() is None
    finally:
        gc.enable()


def test_pickled_models_stay_fused(tmp_path: Path, calls: list[int]) -> None:
    _, fused = pair(FAMILIES[0])
    with torch.no_grad():
        wanted = fused(**prompt(1, 6)).logits
        torch.save(fused, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        calls[0] = 0
        assert torch.equal(again(**prompt(1, 6)).logits, wanted)
    assert calls[0] == 2


def test_training_mode_runs_unfused(calls: list[int]) -> None:
    _, fused = pair(FAMILIES[0])
    fused.train()
    with torch.no_grad():
        fused(**prompt(1, 4))
    assert calls[0] == 0


# ---- the modules ---------------------------------------------------------------------------------------------------


def test_merged_projections_share_their_codes() -> None:
    _, fused = pair(FAMILIES[0])
    attention = blocks(fused)[0].self_attn
    storages = {linear.codes.untyped_storage().data_ptr() for linear in (attention.q_proj, attention.k_proj)}
    assert storages == {attention.v_proj.codes.untyped_storage().data_ptr()}
    names = set(fused.state_dict())
    unfuse_blocks(fused)
    assert names == set(fused.state_dict())


LEFT_OUT = {"modules_to_not_convert": ["layers.0.self_attn.k_proj"]}


@pytest.mark.parametrize(
    ("settings", "device_map", "merged"),
    [
        ({}, "cpu", 4),
        ({"bits": 3}, "cpu", 4),
        (LEFT_OUT, "cpu", 2),
        ({}, {"": "cpu", "model.layers.0": "disk"}, 2),
    ],
)
def test_a_loaded_model_is_merged_where_it_is(
    settings: dict[str, Any], device_map: Any, merged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(FAMILIES[0], **settings).save_quantized(tmp_path)
    real = PackedWeight.joined
    stayed = []

    def joined(weights: list[PackedWeight]) -> PackedWeight:
        whole = real(weights)
        stayed.append([tensor.data_ptr() for tensor in whole] == [tensor.data_ptr() for tensor in weights[0]])
        return whole

    monkeypatch.setattr(PackedWeight, "joined", joined)
    unfused = AutoQForCausalLM.from_quantized(tmp_path, device_map=device_map, fuse_layers=False)
    projection = blocks(unfused.model)[1].self_attn.q_proj.codes
    assert projection.untyped_storage().nbytes() == 4 * projection.numel()
    assert stayed == []
    AutoQForCausalLM.from_quantized(tmp_path, device_map=device_map)
    assert stayed == [True] * merged


def test_conversion_and_copies_stay_right(calls: list[int]) -> None:
    unfused, fused = pair(FAMILIES[0])
    inputs = prompt(1, 7)
    with torch.no_grad():
        twin = copy.deepcopy(fused)
        assert torch.equal(twin(**inputs).logits, fused(**inputs).logits)
        for dtype in (torch.bfloat16, torch.float32):
            exact = exact_logits(unfused.to(dtype), inputs)
            calls[0] = 0
            assert error(fused.to(dtype), inputs, exact) < (3e-2 if dtype == torch.bfloat16 else 4e-6)
            assert calls[0] == 2


def test_linears_that_are_not_quantized_leave_the_block_unfused() -> None:
    variant = FAMILIES[0]
    model = quantized(variant, modules_to_not_convert=["down_proj"]).model
    assert not any("forward" in b.__dict__ for b in blocks(model))
    assert fuse_blocks(model) == 0
