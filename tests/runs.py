"""What the tests of quantizing runs have in common: settings and data, and runs here and in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import Variant, samples
from safetensors.torch import load_file
from torch import Tensor

from autoq import AutoQForCausalLM

SETTINGS = {"group_size": 32, "lm_head_bits": 8, "embedding_bits": 4, "scale_activations": True}
DATA = samples(20)


def quantize(model: AutoQForCausalLM, settings: dict[str, Any] = SETTINGS, **run: Any) -> AutoQForCausalLM:
    run = {"max_calib_samples": 12, "max_calib_seq_len": 32, "progress": False, **run}
    model.quantize(None, settings, run.pop("calib_data", DATA), **run)
    return model


def in_memory(case: Variant, **run: Any) -> AutoQForCausalLM:
    return quantize(AutoQForCausalLM(case.model()), **run)


def on_disk(case: Variant, directory: Path, **run: Any) -> AutoQForCausalLM:
    if not directory.is_dir():
        case.model().save_pretrained(directory)
    return quantize(AutoQForCausalLM.from_pretrained(directory, device_map="disk"), **run)


def saved(model: AutoQForCausalLM, directory: Path) -> dict[str, Tensor]:
    model.save_quantized(directory)
    return load_file(directory / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from families import variant
from runs import SETTINGS, on_disk
from autoq.quantization.ranks import Ranks
settings = {{**SETTINGS, "effort": {effort!r}}}
model = on_disk(variant("llama"), Path({model!r}), settings=settings, work_dir={work!r})
if Ranks().rank == 0 and {out!r}:
    model.save_quantized({out!r})
"""


def script(directory: Path, effort: str = "default", **paths: Any) -> list[str]:
    """A program that quantizes llama from the disk; the paths of its `model`, its `work` and its result (`out`)."""
    values = {"out": "", "effort": effort, **{name: str(path) for name, path in paths.items()}}
    file = directory / "run.py"
    file.write_text(_SCRIPT.format(tests=str(Path(__file__).parent), **values), encoding="utf-8")
    return [str(file)]


def present(directory: Path, pattern: str) -> list[Path]:
    """What is there of a pattern, while another process writes, renames and deletes."""
    try:
        return list(directory.rglob(pattern))
    except FileNotFoundError:
        return []
