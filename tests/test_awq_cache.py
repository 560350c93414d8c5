"""Search results in llm-awq's file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import variant
from runs import SETTINGS, assert_same, in_memory, quantize, saved

from autoq import AutoQForCausalLM
from autoq.errors import CheckpointError, QuantizationError
from autoq.quantization import awq
from autoq.quantization.awq_cache import read_awq_cache

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


@pytest.mark.parametrize("name", ["llama-gqa", "opt-gelu", "falcon-multi-query"])
def test_search_results_are_applied_as_they_were_found(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    case, settings = variant(name), {**SETTINGS, "embedding_bits": None}
    expected = in_memory(case, settings=settings, awq_cache=tmp_path / "cache.pt")
    monkeypatch.setattr(awq, "search_scale", lambda *_arguments: pytest.fail("searched again"))
    monkeypatch.setattr(awq, "search_clip", lambda *_arguments: pytest.fail("searched again"))
    found = in_memory(case, settings=settings, awq_cache=tmp_path / "cache.pt")
    assert_same(saved(found, tmp_path / "found"), saved(expected, tmp_path / "expected"))


def test_the_awq_cache_is_llm_awqs_file(tmp_path: Path) -> None:
    """Written as that package does, by hand: scales and clips come out of the weights as it says."""
    case = variant("llama")
    model = case.model()
    layer = "model.layers.0"
    linears = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    scale = torch.rand(64) + 0.5
    clip = torch.full((96, 2, 1), 0.1)
    content = {"scale": [(f"{layer}.input_layernorm", linears, scale)], "clip": [(f"{layer}.mlp.up_proj", clip)]}
    torch.save(content, tmp_path / "cache.pt")
    settings = {"group_size": 32, "bits": 8, "compensate": False, "effort": "fast"}
    found = quantize(AutoQForCausalLM(case.model()), settings, awq_cache=tmp_path / "cache.pt").model
    norm = model.get_submodule(f"{layer}.input_layernorm").weight
    assert torch.allclose(found.get_submodule(f"{layer}.input_layernorm").weight, norm / scale)
    query = model.get_submodule(linears[0]).weight
    assert torch.allclose(found.get_submodule(linears[0]).weight.float(), query * scale, atol=0.01)
    up = model.get_submodule(f"{layer}.mlp.up_proj").weight.clamp(-0.1, 0.1)
    assert torch.allclose(found.get_submodule(f"{layer}.mlp.up_proj").weight.float(), up, atol=0.002)
    down = model.get_submodule(f"{layer}.mlp.down_proj").weight
    assert torch.allclose(found.get_submodule(f"{layer}.mlp.down_proj").weight.float(), down, atol=0.01)


def test_what_is_written_is_llm_awqs_file(tmp_path: Path) -> None:
    in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
    content = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert content.keys() == {"scale", "clip"}
    prev, linears, scale = content["scale"][0]
    assert (prev, linears[0], scale.shape) == (
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.q_proj",
        (64,),
    )
    clips = dict(content["clip"])
    assert clips["model.layers.1.mlp.up_proj"].shape == (96, 2, 1)
    assert not any("q_proj" in name for name in clips)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "is not a file of AWQ search results"),
        ({"scale": []}, "does not hold AWQ search results"),
        ({"scale": [("a", ("b",), 3)], "clip": []}, "does not hold AWQ search results"),
        ([1], "does not hold AWQ search results"),
    ],
)
def test_other_files_are_no_search_results(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_awq_cache(path)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"scale": [], "clip": [Evil()]}, tmp_path / "cache.pt")
    with pytest.raises(CheckpointError, match="is not a file of AWQ search results"):
        read_awq_cache(tmp_path / "cache.pt")
    assert not (tmp_path / "ran").exists()


def test_search_results_of_another_family_are_refused(tmp_path: Path) -> None:
    in_memory(variant("opt"), awq_cache=tmp_path / "cache.pt")
    with pytest.raises(QuantizationError, match=r"holds a scale for model\.decoder.* of another model"):
        in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
    in_memory(variant("llama"), awq_cache=tmp_path / "llama.pt")
    content = torch.load(tmp_path / "llama.pt", weights_only=True)
    expected = saved(in_memory(variant("llama"), awq_cache=tmp_path / "llama.pt"), tmp_path / "expected")
    turned = [(prev, linears[::-1], scale) for prev, linears, scale in content["scale"]]
    torch.save({**content, "scale": turned}, tmp_path / "turned.pt")
    found = in_memory(variant("llama"), awq_cache=tmp_path / "turned.pt")
    assert_same(saved(found, tmp_path / "found"), expected)
    torch.save({**content, "scale": content["scale"][1:]}, tmp_path / "less.pt")
    with pytest.warns(UserWarning, match=r"no scale for 1 groups .*model\.layers\.0\.input_layernorm"):
        in_memory(variant("llama"), awq_cache=tmp_path / "less.pt")
    torch.save({**content, "clip": [(name, -clip) for name, clip in content["clip"]]}, tmp_path / "negative.pt")
    with pytest.raises(QuantizationError, match="not made of finite, positive numbers"):
        in_memory(variant("llama"), awq_cache=tmp_path / "negative.pt")


@pytest.mark.parametrize("content", [b"hi", b"", b'{"scale": []}', b"import os"])
def test_what_is_no_search_result_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache.pt").write_bytes(content)
    model = AutoQForCausalLM(variant("llama").model())
    with pytest.raises(CheckpointError, match=r"cache\.pt is not a file of AWQ search results"):
        quantize(model, awq_cache=tmp_path / "cache.pt")
    quantize(model)  # nothing was begun


def test_search_results_of_another_model_are_refused(tmp_path: Path) -> None:
    in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
    content = torch.load(tmp_path / "cache.pt", weights_only=True)
    prev, linears, scale = content["scale"][0]
    content["scale"][0] = (prev, linears, scale[:32])
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(QuantizationError, match=r"scale for .*q_proj that is not 64 positive numbers"):
        in_memory(variant("llama"), awq_cache=tmp_path / "short.pt")
    with pytest.raises(QuantizationError, match=r"clips .*v_proj in ranges of shape .* another group size"):
        in_memory(variant("llama"), settings={"group_size": 16}, awq_cache=tmp_path / "cache.pt")
