"""Quantized token embeddings: the rows that ids ask for, in a model that is saved, loaded, fused and moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, Variant, quantized, samples, variant
from safetensors.torch import load_file
from torch import nn

from autoq import AutoQForCausalLM, QuantConfig, ops
from autoq.errors import OperatorError, QuantizationError
from autoq.formats import LinearSpec
from autoq.nn import QuantEmbedding, QuantLinear, shares_head
from autoq.quantization.embeddings import round_rows
from autoq.quantization.weight import dequantize, quantize

_BITS = (2, 3, 4, 8)


def _embeddings(bits: int, rows: int = 37, columns: int = 48, dtype: torch.dtype = torch.float32) -> QuantEmbedding:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return QuantEmbedding.from_weight(quantize(weight, bits, 16), dtype)


@pytest.mark.parametrize("bits", _BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_ids_get_their_rows(bits: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    embeddings = _embeddings(bits, dtype=dtype)
    expected = dequantize(embeddings.quantized_weight(), dtype)
    everything = torch.arange(37, dtype=kind)
    assert torch.equal(embeddings(everything), expected)
    ids = torch.tensor([[36, 0, 16], [15, 15, 1]], dtype=kind)
    assert torch.equal(embeddings(ids), expected[ids])
    assert embeddings(ids).dtype == dtype
    assert embeddings(ids[:, :0]).shape == (2, 0, 48)
    assert torch.equal(embeddings.weight, expected)


def test_the_operator_is_well_formed() -> None:
    embeddings = _embeddings(3)
    arguments = (torch.tensor([[3, 4]]), *embeddings.packed(), 3, 37, 48, torch.bfloat16)
    torch.library.opcheck(torch.ops.autoq.embedding.default, arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 37]), "the id 37 is not one of 37 tokens"),
        (torch.tensor([5, -1]), "the id -1 is not one of 37 tokens"),
        (torch.tensor([0.5]), r"ids are torch\.float32 but must be"),
        (torch.tensor([1], device="meta"), "ids are on meta but the weight on cpu"),
    ],
)
def test_bad_ids_are_sentences(ids: torch.Tensor, message: str) -> None:
    embeddings = _embeddings(4)
    with pytest.raises(OperatorError, match=message):
        ops.embedding(ids, embeddings.packed(), 4, 37, 48, torch.float32)


def test_a_cast_changes_what_comes_out_and_not_the_weight() -> None:
    embeddings = _embeddings(4)
    before = embeddings.quantized_weight()
    embeddings.to(torch.bfloat16)
    assert embeddings(torch.tensor([3])).dtype == torch.bfloat16
    assert torch.equal(embeddings.quantized_weight().scales, before.scales)
    assert embeddings.float()(torch.tensor([3])).dtype == torch.float32


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", _BITS)
def test_rows_are_rounded_better_than_to_the_nearest(bits: int, zero_point: bool, effort: str) -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    spec = LinearSpec(50, 64, bits, 32, zero_point)
    found = dequantize(round_rows(rows, spec, QuantConfig(effort=effort, zero_point=zero_point)))
    nearest = dequantize(quantize(rows, bits, 32, zero_point))
    share = (found - rows).square().sum() / (nearest - rows).square().sum()
    assert share < (0.97 if bits < 8 else 1.0 + 1e-6)


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_the_embeddings_of_every_family_are_quantized(case: Variant) -> None:
    plain, model = quantized(case), quantized(case, embedding_bits=8, embedding_group_size=16)
    embeddings = model.model.get_input_embeddings()
    assert isinstance(embeddings, QuantEmbedding)
    assert (embeddings.spec.bits, embeddings.spec.group_size) == (8, 16)
    assert isinstance(model.model.lm_head, nn.Linear)  # one that was tied has its own weight now
    line = model.report.embeddings
    assert model.model.get_submodule(line.name) is embeddings
    assert line.error_after <= line.error_before < 1e-4
    ids = samples()[0][None]
    with torch.no_grad():
        wanted = plain(ids).logits
        assert 0 < (model(ids).logits - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("case", [*FAMILIES, variant("llama-tied")], ids=lambda case: case.name)
@pytest.mark.parametrize("head", [{}, {"lm_head_bits": 4, "lm_head_group_size": 16}], ids=["head", "quantized head"])
def test_a_saved_model_is_the_same_fused_or_not(case: Variant, head: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(case, embedding_bits=3, embedding_group_size=32, **head)
    model.save_quantized(tmp_path)
    prompt = samples()[0][None, :9]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **options)
    with torch.no_grad():
        logits = model(prompt).logits
    for fused in (True, False):
        again = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu", fuse_layers=fused, torch_dtype="float32")
        assert isinstance(again.model.get_input_embeddings(), QuantEmbedding)
        assert isinstance(again.model.lm_head, QuantLinear) == bool(head)
        assert again.quant_config == model.quant_config
        assert torch.equal(again.generate(prompt, **options), wanted)
        with torch.no_grad():
            assert (again(prompt).logits - logits).norm() < 1e-4 * logits.norm()
    again.save_quantized(tmp_path / "again")
    files = [directory / "model.safetensors" for directory in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "embeddings have 3 bits" in (tmp_path / "README.md").read_text()


def test_a_tied_head_with_the_same_settings_shares_the_codes(tmp_path: Path) -> None:
    case = variant("llama-tied")
    both = {"embedding_bits": 8, "embedding_group_size": 32, "lm_head_bits": 8, "lm_head_group_size": 32}
    model, plain = quantized(case, **both), quantized(case)
    assert shares_head(model.model)
    line = model.report.linears[-1]
    assert (line.name, line.bits, line.group_size, line.note) == ("lm_head", 8, 32, "tied to the embeddings")
    assert "lm_head                                             8    32  tied to the embeddings" in str(model.report)
    assert line not in model.report.worst
    ids = samples()[0][None]
    with torch.no_grad():
        logits, wanted = model(ids).logits, plain(ids).logits
        assert 0 < (logits - wanted).norm() < 0.05 * wanted.norm()
    model.save_quantized(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.qweight" in names
    assert not any(name.startswith("lm_head") for name in names)
    again = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu", torch_dtype="float32")
    assert shares_head(again.model)
    with torch.no_grad():
        assert (again(ids).logits - logits).norm() < 1e-4 * logits.norm()
    again.save_quantized(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == names
    on_disk = AutoQForCausalLM.from_quantized(tmp_path, device_map="disk")
    with torch.no_grad():
        assert (on_disk(ids).logits - logits).norm() < 0.05 * logits.norm()
    on_disk.save_quantized(tmp_path / "third")
    third = AutoQForCausalLM.from_quantized(tmp_path / "third", device_map="cpu", torch_dtype="float32")
    with torch.no_grad():
        assert torch.equal(third(ids).logits, again(ids).logits)
    assert shares_head(again.to(torch.bfloat16).model)
    assert shares_head(again.to(torch.float32).model)
    other = quantized(case, **{**both, "lm_head_bits": 4})
    assert not shares_head(other.model)
    assert not shares_head(quantized(variant("llama"), **both).model)


@pytest.mark.parametrize(("given", "other"), [("embedding", "lm_head"), ("lm_head", "embedding")])
def test_untying_that_takes_more_memory_is_said(given: str, other: str) -> None:
    with pytest.warns(UserWarning, match=rf"{given}_bits without {other}_bits: .*takes more memory"):
        quantized(variant("llama-tied"), **{f"{given}_bits": 8})


def test_what_cannot_be_quantized_is_a_sentence() -> None:
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens has 64 columns, which embedding_group_size=128"):
        quantized(variant("llama"), embedding_bits=4, indivisible="skip")
    model = variant("llama").model()

    class Scaled(nn.Embedding):
        pass

    model.model.embed_tokens = Scaled(model.config.vocab_size, 64)
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens is a Scaled, not an Embedding"):
        AutoQForCausalLM(model).quantize(None, {"embedding_bits": 4}, samples(), progress=False)
    model = variant("llama").model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = torch.inf
    with pytest.raises(QuantizationError, match=r"the weight of model\.embed_tokens holds NaN or infinity"):
        AutoQForCausalLM(model).quantize(None, {"embedding_bits": 4}, samples(), progress=False)
