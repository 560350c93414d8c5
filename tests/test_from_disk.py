"""Models on the disk, a block of which is in memory at a time, and the memory that a run takes."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Variant, samples, variant
from runs import assert_same, in_memory, on_disk, quantize, saved
from torch import nn

from autoq import AutoQForCausalLM, checkpoint
from autoq.errors import CheckpointError
from autoq.nn import spread
from autoq.quantization import activations, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
def test_the_next_block_is_read_while_this_one_is_worked_on(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("opt-gelu")
    case.model().save_pretrained(tmp_path / "model")
    hints: list[tuple[int, bytes]] = []

    def note(descriptor: int, start: int, length: int, _advice: int) -> None:
        hints.append((len(brought), os.pread(descriptor, length, start)))

    def counted(block: nn.Module, name: str) -> None:
        brought.append(name)
        spread.bring(block, name)

    brought: list[str] = []
    monkeypatch.setattr(pipeline, "bring", counted)
    monkeypatch.setattr(checkpoint, "_HINT", 1000)
    monkeypatch.setattr(os, "posix_fadvise", note)
    on_disk(case, tmp_path / "model")
    assert {count for count, _ in hints} == {1}
    # All of the second block was asked for, and nothing else.
    second = case.model().model.decoder.layers[1].state_dict()
    assert sorted(b"".join(part for _, part in hints)) == sorted(
        b"".join(tensor.numpy().tobytes() for tensor in second.values())
    )


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_a_model_on_the_disk_becomes_what_one_in_memory_does(case: Variant, tmp_path: Path) -> None:
    expected = in_memory(case)
    found = on_disk(case, tmp_path / "model")
    assert all(parameter.is_meta for parameter in found.model.get_submodule(_blocks_of(found)).parameters())
    assert (found.report.linears, found.report.held_out) == (expected.report.linears, expected.report.held_out)
    parts = found.report.seconds_by_part
    assert parts.keys() == {
        "embeddings", "reading", "observing", "searching", "writing", "passing on", "head", "judging"
    }  # fmt: skip
    assert 0 < sum(parts.values()) <= found.report.seconds
    prompt = samples(1)[0][None]
    assert torch.equal(found(prompt).logits, expected(prompt).logits)
    assert_same(saved(found, tmp_path / "found"), saved(expected, tmp_path / "expected"))


def _blocks_of(model: AutoQForCausalLM) -> str:
    names = [name for name, module in model.model.named_modules() if isinstance(module, nn.ModuleList)]
    return names[0]


def test_full_precision_weights_are_in_memory_one_block_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    held = []
    observe = activations.observe

    def look(block: nn.Module, *others: Any) -> Any:
        held.append([name for name, parameter in model.model.named_parameters() if not parameter.is_meta])
        return observe(block, *others)

    case = variant("llama")
    case.model().save_pretrained(tmp_path / "model")
    model = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk")
    monkeypatch.setattr("autoq.quantization.pipeline.observe", look)
    quantize(model, {"group_size": 32})
    assert len(held) == 2
    for index, names in enumerate(held):
        assert names
        assert all(f"layers.{index}." in name for name in names)


def test_what_a_block_was_is_freed_at_once(tmp_path: Path) -> None:
    case = variant("llama")
    case.model().save_pretrained(tmp_path / "model")
    model = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk")
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    held = [weakref.ref(module) for module in linears]
    del linears
    gc.collect()
    gc.disable()
    try:
        quantize(model, {"group_size": 32})
        assert [reference() for reference in held if reference() is not None] == [model.model.lm_head]
    finally:
        gc.enable()


def test_a_model_from_the_disk_is_saved_with_its_dtype(tmp_path: Path) -> None:
    variant("llama").model().half().save_pretrained(tmp_path / "model")
    model = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk")
    assert model.model.config.dtype == torch.float16
    quantize(model).save_quantized(tmp_path / "once")
    AutoQForCausalLM.from_quantized(tmp_path / "once").save_quantized(tmp_path / "twice")
    for name in ("once", "twice"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "float16"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_same_from_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tables that are computed, not stored, too."""
    case = variant("gptj")
    case.model().to(dtype).save_pretrained(tmp_path / "model")
    prompt = samples(1)[0][None]
    found = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk")
    expected = AutoQForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(found(prompt).logits, expected(prompt).logits)


def test_a_relative_path_survives_a_change_of_directory(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    case.model().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = AutoQForCausalLM.from_pretrained("model", device_map="disk")
    quantize(model, work_dir="work")
    monkeypatch.chdir("/")
    model(samples(1)[0][None])


def test_weights_that_are_gone_are_a_sentence(tmp_path: Path) -> None:
    case = variant("llama")
    model = on_disk(case, tmp_path / "model", work_dir=tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(
        CheckpointError, match=r"layers\.0\..* cannot be read from the disk any more .*load the model again"
    ):
        model(samples(1)[0][None])
