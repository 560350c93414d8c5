"""How a run goes about it: from the disk, in little memory, stopped and resumed, with what earlier runs found, shared
by processes, and judged on held-out text."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import VARIANTS, Variant, samples, variant
from safetensors.torch import load_file
from torch import Tensor, nn

from autoq import AutoQForCausalLM, QuantConfig
from autoq.errors import AutoQError, CalibrationError, CheckpointError, ConfigError, QuantizationError
from autoq.evaluation.divergence import compare
from autoq.quantization import activations, awq, budget, pipeline, workspace
from autoq.quantization import search as searching
from autoq.quantization.awq_cache import read_awq_cache
from autoq.quantization.plan import Plan
from autoq.quantization.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]

SETTINGS = {"group_size": 32, "lm_head_bits": 8, "embedding_bits": 4, "scale_activations": True}
DATA = samples(20)


def _quantize(model: AutoQForCausalLM, settings: dict[str, Any] = SETTINGS, **run: Any) -> AutoQForCausalLM:
    run = {"max_calib_samples": 12, "max_calib_seq_len": 32, "progress": False, **run}
    model.quantize(None, settings, run.pop("calib_data", DATA), **run)
    return model


def _in_memory(case: Variant, **run: Any) -> AutoQForCausalLM:
    return _quantize(AutoQForCausalLM(case.model()), **run)


def _on_disk(case: Variant, directory: Path, **run: Any) -> AutoQForCausalLM:
    if not directory.is_dir():
        case.model().save_pretrained(directory)
    return _quantize(AutoQForCausalLM.from_pretrained(directory, device_map="disk"), **run)


def _saved(model: AutoQForCausalLM, directory: Path) -> dict[str, Tensor]:
    model.save_quantized(directory)
    return load_file(directory / "model.safetensors")


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# From the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_a_model_on_the_disk_becomes_what_one_in_memory_does(case: Variant, tmp_path: Path) -> None:
    expected = _in_memory(case)
    found = _on_disk(case, tmp_path / "model")
    assert all(parameter.is_meta for parameter in found.model.get_submodule(_blocks_of(found)).parameters())
    assert (found.report.linears, found.report.held_out) == (expected.report.linears, expected.report.held_out)
    parts = found.report.seconds_by_part
    assert parts.keys() == {
        "embeddings", "reading", "observing", "searching", "writing", "passing on", "head", "judging"
    }  # fmt: skip
    assert 0 < sum(parts.values()) <= found.report.seconds
    prompt = samples(1)[0][None]
    assert torch.equal(found(prompt).logits, expected(prompt).logits)
    _assert_same(_saved(found, tmp_path / "found"), _saved(expected, tmp_path / "expected"))


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
    _quantize(model, {"group_size": 32})
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
        _quantize(model, {"group_size": 32})
        assert [reference() for reference in held if reference() is not None] == [model.model.lm_head]
    finally:
        gc.enable()


def test_the_memory_is_settled_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = variant("llama")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(
        ConfigError, match=r"takes [\d,.]+ MB of memory.*max_memory allows 1\.0 MB.*device_map=\"disk\""
    ):
        _quantize(model, max_memory="1MB")
    with pytest.raises(ConfigError, match="max_memory is 'much'"):
        _quantize(model, max_memory="much")
    _quantize(AutoQForCausalLM(case.model()), max_memory="100GB", progress=True)
    assert "quantizing takes about" in capsys.readouterr().out


def test_hidden_states_go_to_the_disk_when_memory_is_short(tmp_path: Path, monkeypatch: Any) -> None:
    model = variant("llama").model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    tokens = 10**6
    load = budget.Load(tokens, resident=budget.resident_bytes())
    settle = partial(budget.settle_memory, model, plan, load, work_dir=None)
    in_memory, on_disk = (budget.estimate(model, plan, load, way, True) for way in (True, False))
    assert in_memory.memory - on_disk.memory == pytest.approx(tokens * 64 * 4, rel=0.2)
    assert on_disk.disk - in_memory.disk == 2 * tokens * 64 * 4
    assert not settle(max_memory=in_memory.memory + 10**8)[0]
    assert settle(max_memory=on_disk.memory + 10**8)[0]
    assert on_disk.for_share(0.25).seconds == on_disk.seconds / 4
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match=r"on the disk, but .* has 0\.0 MB left; give a work_dir"):
        settle(max_memory=on_disk.memory + 10**8)
    # What a stopped run has written counts.
    (tmp_path / "block-00000.safetensors").write_bytes(bytes(10**6))
    with (tmp_path / "hidden").open("wb") as file:
        file.truncate(on_disk.disk)
    settle(max_memory=None, work_dir=tmp_path)


def test_statistics_need_room_where_they_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    full = tmp_path / "full"
    usage = shutil.disk_usage

    def look(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9, 1000) if path.is_relative_to(full) else usage(path)

    full.mkdir()
    monkeypatch.setattr(budget.shutil, "disk_usage", look)
    with pytest.raises(ConfigError, match=r"full/statistics has 0\.0 MB left; give a statistics where there is more"):
        _in_memory(variant("llama"), statistics=full / "statistics", work_dir=tmp_path / "work")


def test_a_model_from_the_disk_is_saved_with_its_dtype(tmp_path: Path) -> None:
    variant("llama").model().half().save_pretrained(tmp_path / "model")
    model = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk")
    assert model.model.config.dtype == torch.float16
    _quantize(model).save_quantized(tmp_path / "once")
    AutoQForCausalLM.from_quantized(tmp_path / "once").save_quantized(tmp_path / "twice")
    for name in ("once", "twice"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "float16"


def test_without_a_limit_what_is_free_is_the_limit(monkeypatch: Any) -> None:
    model = variant("llama").model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    load = budget.Load(10**6)
    free = budget.estimate(model, plan, load, False, True).memory
    memory = dataclasses.make_dataclass("Memory", ["available"])
    for available, spills in ((10**12, False), (free + 10**6, True)):
        monkeypatch.setattr(budget.psutil, "virtual_memory", lambda available=available: memory(available))
        assert budget.settle_memory(model, plan, load, max_memory=None, work_dir=None)[0] == spills
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: memory(10**6))
    with pytest.warns(UserWarning, match=r"takes [\d,.]+ MB of memory.*but 1\.0 MB are free"):
        budget.settle_memory(model, plan, load, max_memory=None, work_dir=None)


def test_what_an_estimate_counts() -> None:
    model = variant("llama").model()

    def found(settings: dict[str, Any], in_memory: bool = True, **load: Any) -> budget.Estimate:
        plan = Plan.of(model, QuantConfig(group_size=32, **settings))
        return budget.estimate(model, plan, budget.Load(**{"tokens": 10**5, **load}), in_memory, False)

    grams = 4 * 2 * (3 * 64**2 + 128**2)
    kept = found({}, statistics=Path("statistics"))
    assert kept.disk - found({}).disk == kept.statistics == pytest.approx(grams, rel=0.5)
    assert found({}, longest=10**5).memory > found({}).memory
    assert found({}, held_out_tokens=10**5, longest=10**5).memory > found({}, held_out_tokens=10**5).memory
    assert found({}, device=torch.device("meta")).memory < found({}).memory
    assert found({}, resident=10**9).memory == found({}).memory + 10**9


def test_hidden_states_on_the_disk_change_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    expected = _in_memory(case)
    monkeypatch.setattr(pipeline, "settle_memory", lambda *_arguments, **_options: (True, None))
    kept = []
    write = activations.HiddenStates.write

    def note(self: activations.HiddenStates, batch: int, states: Tensor) -> None:
        write(self, batch, states)
        kept.append(len(self._batches))

    monkeypatch.setattr(activations.HiddenStates, "write", note)
    found = _in_memory(case)
    assert kept
    assert set(kept) == {0}
    _assert_same(_saved(found, tmp_path / "found"), _saved(expected, tmp_path / "expected"))


# Stopped and resumed ------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """What no code catches by mistake."""


@pytest.mark.parametrize("disk", [False, True], ids=["in-memory", "on-disk"])
def test_a_run_stopped_at_any_write_goes_on_and_ends_with_the_same_bits(
    disk: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    case = variant("opt-gelu")
    make: Callable[..., AutoQForCausalLM] = (
        partial(_on_disk, case, tmp_path / "model") if disk else partial(_in_memory, case)
    )
    expected = make()
    wanted = _saved(expected, tmp_path / "expected")
    writes = 0
    replace, save = os.replace, activations.save_file

    def counted(function: Callable[..., None], stop: int, when: str) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == stop and when == "before":
                raise _Stop
            function(*arguments, **options)
            if writes == stop:
                raise _Stop

        return run

    stop = 0
    while True:
        stop += 1
        when = ("before", "after")[stop % 2]
        writes = 0
        for module in (workspace, activations):
            monkeypatch.setattr(module, "save_file", counted(save, stop, when))
            monkeypatch.setattr(module.os, "replace", counted(replace, stop, when))
        work = tmp_path / f"work-{stop}"
        try:
            make(work_dir=work)
            break
        except _Stop:
            monkeypatch.undo()
        found = make(work_dir=work)
        assert (found.report.linears, found.report.held_out) == (expected.report.linears, expected.report.held_out)
        _assert_same(_saved(found, tmp_path / f"found-{stop}"), wanted)
        shutil.rmtree(work)
    assert stop > 25


def test_a_finished_run_is_taken_up_without_searching_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("mpt")
    expected = _saved(_in_memory(case, work_dir=tmp_path / "work"), tmp_path / "expected")
    monkeypatch.setattr(pipeline, "quantize_block", lambda *_arguments: pytest.fail("searched again"))
    monkeypatch.setattr(pipeline, "observe", lambda *_arguments: pytest.fail("observed again"))
    _assert_same(_saved(_in_memory(case, work_dir=tmp_path / "work"), tmp_path / "found"), expected)


def test_lost_hidden_states_are_computed_again(tmp_path: Path) -> None:
    case = variant("llama")
    expected = _saved(_in_memory(case, work_dir=tmp_path / "work"), tmp_path / "expected")
    shutil.rmtree(next((tmp_path / "work").glob("activations-*")))
    (tmp_path / "work" / "block-00001.safetensors").unlink()
    _assert_same(_saved(_in_memory(case, work_dir=tmp_path / "work"), tmp_path / "found"), expected)


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    case = variant("llama")
    _in_memory(case, work_dir=tmp_path / "work")
    other = AutoQForCausalLM(case.model(seed=1))
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("the setting bits", lambda: _in_memory(case, settings={**SETTINGS, "bits": 3}, work_dir=tmp_path / "work")),
        ("calibration samples", lambda: _in_memory(case, calib_data=samples(20, seed=3), work_dir=tmp_path / "work")),
        ("model", lambda: _quantize(other, work_dir=tmp_path / "work")),
        ("held-out samples", lambda: _in_memory(case, max_eval_samples=3, work_dir=tmp_path / "work")),
    ]
    for what, change in changes:
        with pytest.raises(ConfigError, match=rf"holds the work of another run: .*{what}.* differ"):
            change()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ConfigError, match="photos holds files that are not of a quantization"):
        _in_memory(case, work_dir=tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be used as the work_dir"):
        _in_memory(case, work_dir=tmp_path / "file")


def test_a_finished_run_that_wrote_its_findings_is_taken_up(tmp_path: Path) -> None:
    case = variant("llama")
    run = {name: tmp_path / name for name in ("work_dir", "statistics", "awq_cache")}
    expected = _saved(_in_memory(case, **run), tmp_path / "expected")
    _assert_same(_saved(_in_memory(case, **run), tmp_path / "found"), expected)
    (tmp_path / "work_dir" / "block-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="statistics collected earlier, search results differ"):
        _in_memory(case, **run)


def test_a_damaged_block_is_a_sentence(tmp_path: Path) -> None:
    case = variant("llama")
    _in_memory(case, work_dir=tmp_path / "work")
    path = tmp_path / "work" / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors is damaged .*delete it"):
        _in_memory(case, work_dir=tmp_path / "work")
    path.unlink()
    _in_memory(case, work_dir=tmp_path / "work")


_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_run
from families import variant
model = test_run._on_disk(variant("llama"), Path({model!r}), work_dir={work!r})
if test_run.Ranks().rank == 0 and {out!r}:
    model.save_quantized({out!r})
"""


def _script(directory: Path, **paths: Any) -> list[str]:
    values = {name: str(path) for name, path in paths.items()}
    script = directory / "run.py"
    script.write_text(_SCRIPT.format(tests=str(Path(__file__).parent), **{"out": "", **values}), encoding="utf-8")
    return [str(script)]


def _present(directory: Path, pattern: str) -> list[Path]:
    """What is there of a pattern, while another process writes, renames and deletes."""
    try:
        return list(directory.rglob(pattern))
    except FileNotFoundError:
        return []


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    case = variant("llama")
    expected = _saved(_on_disk(case, tmp_path / "model"), tmp_path / "expected")
    work = tmp_path / "work"
    command = [sys.executable, *_script(tmp_path, model=tmp_path / "model", work=work, out=tmp_path / "found")]
    for files in (1, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(_present(work, "*.safetensors")) < files:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was not done
    subprocess.run(command, check=True, capture_output=True)
    _assert_same(load_file(tmp_path / "found" / "model.safetensors"), expected)


# What earlier runs found --------------------------------------------------------------------------------------------


def test_statistics_serve_other_bits_and_group_sizes(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("falcon-multi-query")
    other = {**SETTINGS, "bits": 3, "group_size": 16}
    expected = _in_memory(case, settings=other)
    _in_memory(case, statistics=tmp_path / "statistics")
    monkeypatch.setattr(pipeline, "observe", lambda *_arguments: pytest.fail("calibrated again"))
    monkeypatch.setattr("autoq.quantization.head.observe_head", lambda *_arguments: pytest.fail("calibrated again"))
    found = _in_memory(case, settings=other, statistics=tmp_path / "statistics")
    assert found.report.linears == expected.report.linears
    assert found.report.calibration == f"{expected.report.calibration} (statistics collected earlier)"
    _assert_same(_saved(found, tmp_path / "found"), _saved(expected, tmp_path / "expected"))
    with pytest.raises(ConfigError, match=r"the statistics in .* are of another model"):
        _quantize(AutoQForCausalLM(case.model(seed=1)), statistics=tmp_path / "statistics")
    (tmp_path / "statistics" / "block-00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors is missing or damaged"):
        _in_memory(case, statistics=tmp_path / "statistics")


def test_statistics_without_the_heads_do_not_serve_the_head(tmp_path: Path) -> None:
    case = variant("llama")
    _in_memory(case, settings={"group_size": 32}, statistics=tmp_path / "statistics")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(ConfigError, match="were collected without lm_head"):
        _quantize(model, statistics=tmp_path / "statistics")
    _quantize(model, {"group_size": 32})  # nothing was begun


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    case = variant("llama")
    _in_memory(case, settings={"group_size": 32}, statistics=tmp_path / "statistics")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(ConfigError, match="were collected without lm_head"):
        _quantize(model, statistics=tmp_path / "statistics", work_dir=tmp_path / "work")
    _in_memory(case, work_dir=tmp_path / "work")
    other = tmp_path / "other"
    with pytest.raises(ConfigError, match="was begun without statistics"):
        _quantize(model, statistics=other, work_dir=tmp_path / "work")
    assert not other.exists()
    # Tuning reads no statistics: it does not miss the head's.
    best = {**SETTINGS, "effort": "best"}
    _quantize(AutoQForCausalLM(case.model()), best, statistics=tmp_path / "statistics", max_calib_samples=2)


def test_kept_statistics_are_neither_mixed_nor_written_over(tmp_path: Path) -> None:
    case = variant("llama")
    kept = tmp_path / "statistics"
    _in_memory(case, statistics=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    _in_memory(case, settings={**SETTINGS, "effort": "best"}, calib_data=samples(20, seed=4), statistics=kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    # A run that was begun without keeping them cannot keep those of the blocks it has done.
    _in_memory(case, work_dir=tmp_path / "work")
    with pytest.raises(ConfigError, match=r"begun without statistics=.*, which lacks block-00000"):
        _in_memory(case, work_dir=tmp_path / "work", statistics=tmp_path / "new")
    # What a stopped run left is of its own data only.
    content = json.loads((kept / "statistics.json").read_text())
    (kept / "statistics.json").write_text(json.dumps({**content, "names": []}))
    with pytest.raises(ConfigError, match="holds a part of the statistics of other calibration data"):
        _in_memory(case, calib_data=samples(20, seed=4), statistics=kept)
    earlier = load_file(kept / "block-00001.safetensors")
    _in_memory(case, statistics=kept)
    _assert_same(load_file(kept / "block-00001.safetensors"), earlier)


def test_places_that_cannot_be_written_are_known_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, path in (("awq_cache", "file/cache.pt"), ("statistics", "file/statistics"), ("work_dir", "file/work")):
        model = AutoQForCausalLM(variant("llama").model())
        with pytest.raises(AutoQError, match="file"):
            _quantize(model, **{name: tmp_path / path})
        model(samples(1)[0][None])  # still a model
    with pytest.raises(ConfigError, match="work_dir is 5; it should be a path"):
        _quantize(model, work_dir=5)


def test_a_disk_that_fills_up_is_a_sentence_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    expected = _saved(_in_memory(case), tmp_path / "expected")
    save, count = workspace.save_file, 0

    def fills(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(workspace, "save_file", fills)
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors could not be written .*No space left"):
        _in_memory(case, work_dir=tmp_path / "work")
    monkeypatch.undo()
    assert not list((tmp_path / "work").glob(".*"))
    _assert_same(_saved(_in_memory(case, work_dir=tmp_path / "work"), tmp_path / "found"), expected)


@pytest.mark.parametrize("value", [0, -5, True, "128", None, 1.5])
def test_numbers_of_samples_are_checked(value: Any) -> None:
    with pytest.raises(CalibrationError, match=r"max_calib_samples is .*; it should be a number of at least 1"):
        _in_memory(variant("llama"), max_calib_samples=value)


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
    _quantize(model, work_dir="work")
    monkeypatch.chdir("/")
    model(samples(1)[0][None])


@pytest.mark.parametrize("name", ["llama-gqa", "opt-gelu", "falcon-multi-query"])
def test_search_results_are_applied_as_they_were_found(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    case, settings = variant(name), {**SETTINGS, "embedding_bits": None}
    expected = _in_memory(case, settings=settings, awq_cache=tmp_path / "cache.pt")
    monkeypatch.setattr(awq, "search_scale", lambda *_arguments: pytest.fail("searched again"))
    monkeypatch.setattr(awq, "search_clip", lambda *_arguments: pytest.fail("searched again"))
    found = _in_memory(case, settings=settings, awq_cache=tmp_path / "cache.pt")
    _assert_same(_saved(found, tmp_path / "found"), _saved(expected, tmp_path / "expected"))


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
    found = _quantize(AutoQForCausalLM(case.model()), settings, awq_cache=tmp_path / "cache.pt").model
    norm = model.get_submodule(f"{layer}.input_layernorm").weight
    assert torch.allclose(found.get_submodule(f"{layer}.input_layernorm").weight, norm / scale)
    query = model.get_submodule(linears[0]).weight
    assert torch.allclose(found.get_submodule(linears[0]).weight.float(), query * scale, atol=0.01)
    up = model.get_submodule(f"{layer}.mlp.up_proj").weight.clamp(-0.1, 0.1)
    assert torch.allclose(found.get_submodule(f"{layer}.mlp.up_proj").weight.float(), up, atol=0.002)
    down = model.get_submodule(f"{layer}.mlp.down_proj").weight
    assert torch.allclose(found.get_submodule(f"{layer}.mlp.down_proj").weight.float(), down, atol=0.01)


def test_what_is_written_is_llm_awqs_file(tmp_path: Path) -> None:
    _in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
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
    _in_memory(variant("opt"), awq_cache=tmp_path / "cache.pt")
    with pytest.raises(QuantizationError, match=r"holds a scale for model\.decoder.* of another model"):
        _in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
    _in_memory(variant("llama"), awq_cache=tmp_path / "llama.pt")
    content = torch.load(tmp_path / "llama.pt", weights_only=True)
    expected = _saved(_in_memory(variant("llama"), awq_cache=tmp_path / "llama.pt"), tmp_path / "expected")
    turned = [(prev, linears[::-1], scale) for prev, linears, scale in content["scale"]]
    torch.save({**content, "scale": turned}, tmp_path / "turned.pt")
    found = _in_memory(variant("llama"), awq_cache=tmp_path / "turned.pt")
    _assert_same(_saved(found, tmp_path / "found"), expected)
    torch.save({**content, "scale": content["scale"][1:]}, tmp_path / "less.pt")
    with pytest.warns(UserWarning, match=r"no scale for 1 groups .*model\.layers\.0\.input_layernorm"):
        _in_memory(variant("llama"), awq_cache=tmp_path / "less.pt")
    torch.save({**content, "clip": [(name, -clip) for name, clip in content["clip"]]}, tmp_path / "negative.pt")
    with pytest.raises(QuantizationError, match="not made of finite, positive numbers"):
        _in_memory(variant("llama"), awq_cache=tmp_path / "negative.pt")


@pytest.mark.parametrize("content", [b"hi", b"", b'{"scale": []}', b"import os"])
def test_what_is_no_search_result_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache.pt").write_bytes(content)
    model = AutoQForCausalLM(variant("llama").model())
    with pytest.raises(CheckpointError, match=r"cache\.pt is not a file of AWQ search results"):
        _quantize(model, awq_cache=tmp_path / "cache.pt")
    _quantize(model)  # nothing was begun


def test_search_results_of_another_model_are_refused(tmp_path: Path) -> None:
    _in_memory(variant("llama"), awq_cache=tmp_path / "cache.pt")
    content = torch.load(tmp_path / "cache.pt", weights_only=True)
    prev, linears, scale = content["scale"][0]
    content["scale"][0] = (prev, linears, scale[:32])
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(QuantizationError, match=r"scale for .*q_proj that is not 64 positive numbers"):
        _in_memory(variant("llama"), awq_cache=tmp_path / "short.pt")
    with pytest.raises(QuantizationError, match=r"clips .*v_proj in ranges of shape .* another group size"):
        _in_memory(variant("llama"), settings={"group_size": 16}, awq_cache=tmp_path / "cache.pt")


# Judged -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "bloom", "gptj"])
def test_the_held_out_figures_are_those_of_comparing_the_models(name: str) -> None:
    case = variant(name)
    held_out = samples(5, 32, seed=8)
    model = _in_memory(case, eval_data=held_out)
    found = model.report.held_out
    expected = compare(case.model(), model, None, torch.cat(held_out), 32, progress=False)
    assert found.tokens == 5 * 32
    assert found.kl_divergence == pytest.approx(expected.divergence.value, rel=1e-3)
    assert found.top1_agreement == expected.divergence.top1_agreement
    assert found.perplexity_before == pytest.approx(expected.reference.value, rel=1e-5)
    assert found.perplexity_after == pytest.approx(expected.model.value, rel=1e-4)


def test_held_out_text_is_what_the_calibration_leaves_over() -> None:
    case = variant("llama")
    model = _in_memory(case, max_eval_samples=3)
    assert model.report.tokens == 12 * 32
    assert model.report.held_out.tokens == 3 * 32
    assert model.report.held_out.kl_divergence == pytest.approx(
        _in_memory(case, calib_data=DATA[:12], eval_data=DATA[12:15]).report.held_out.kl_divergence
    )
    assert _in_memory(case, max_eval_samples=0).report.held_out is None
    assert _in_memory(case, calib_data=DATA[:12]).report.held_out is None
    assert "held-out text (96 tokens" in str(model.report)


def test_bad_results_are_not_saved_silently(tmp_path: Path) -> None:
    model = _in_memory(variant("llama"), settings={"bits": 2, "group_size": 32}, max_kl=1e-4)
    message = r"KL divergence .* is [\d.]+ on held-out text, beyond max_kl=0\.0001; .*largest output errors are model"
    with pytest.raises(QuantizationError, match=message):
        model.save_quantized(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_quantized(tmp_path / "out", ignore_max_kl=True)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["held_out"]["kl_divergence"] > report["max_kl"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"KL divergence {report['held_out']['kl_divergence']:.3g}" in card
    _in_memory(variant("llama"), max_kl=5.0).save_quantized(tmp_path / "fine")


def test_nan_predictions_are_beyond_any_limit() -> None:
    report = _in_memory(variant("llama"), max_kl=5.0).report
    report.held_out = dataclasses.replace(report.held_out, kl_divergence=math.nan)
    with pytest.raises(QuantizationError, match="is nan"):
        report.check_quality()


@pytest.mark.parametrize("value", [0, -1.0, "small", True])
def test_max_kl_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_kl is"):
        _in_memory(variant("llama"), max_kl=value)


def test_max_kl_needs_held_out_text() -> None:
    with pytest.raises(ConfigError, match=r"max_kl needs text.*eval_data"):
        _in_memory(variant("llama"), calib_data=DATA[:12], max_kl=0.1)


def test_the_share_of_clipped_weights_is_reported() -> None:
    report = _in_memory(variant("llama"), settings={"bits": 2, "group_size": 32}).report
    shares = {entry.name.rpartition(".")[2]: entry.clipped for entry in report.quantized}
    assert shares["q_proj"] == shares["k_proj"] == 0
    assert 0 < shares["up_proj"] < 0.5


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_is_found_exact_in_every_variant(case: Variant, dtype: torch.dtype) -> None:
    _quantize(AutoQForCausalLM(case.model().to(dtype)), {"group_size": 16, "bits": 3, "scale_activations": True})


def test_a_block_that_folding_changes_is_refused(monkeypatch: Any) -> None:
    """As in a family whose description forgets that something else reads what a norm gives."""

    def forgetful(prev: nn.Module, linears: Any, scale: Tensor, rows: Tensor | None = None) -> Tensor:
        return fold(prev, linears[:1], scale, rows)

    fold = awq.fold_scale
    monkeypatch.setattr(searching.awq, "fold_scale", forgetful)
    with pytest.raises(
        QuantizationError, match=r"folding the scales changes the output of model\.layers\.0 by [\d.]+%"
    ):
        _in_memory(variant("llama"))


# Shared by processes ------------------------------------------------------------------------------------------------


def _together(count: int, command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, capture_output=True, text=True, cwd=directory, env=environment, timeout=300)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work(count: int, tmp_path: Path) -> None:
    expected = _saved(_on_disk(variant("llama"), tmp_path / "model"), tmp_path / "expected")
    paths = {"model": tmp_path / "model", "work": tmp_path / "work", "out": tmp_path / "found"}
    done = _together(count, _script(tmp_path, **paths), tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found" / "model.safetensors")
    assert found.keys() == expected.keys()
    # Sums in another order may round a few weights to the neighbouring code.
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
        else:
            assert (found[name] == tensor).float().mean() > 0.9, name
    report = json.loads((tmp_path / "found" / "quantization_report.json").read_text())
    single = json.loads((tmp_path / "expected" / "quantization_report.json").read_text())
    assert report["held_out"]["tokens"] == single["held_out"]["tokens"]
    assert report["held_out"]["kl_divergence"] == pytest.approx(single["held_out"]["kl_divergence"], rel=0.1)
    for entry, other in zip(report["linears"], single["linears"], strict=True):
        assert (entry["name"], entry["tokens"]) == (other["name"], other["tokens"])
        assert entry["error_after"] == pytest.approx(other["error_after"], rel=0.05)


def test_a_lost_process_leaves_work_that_is_resumed(tmp_path: Path) -> None:
    variant("llama").model().save_pretrained(tmp_path / "model")
    work = tmp_path / "work"
    paths = {"model": tmp_path / "model", "work": work, "out": tmp_path / "found"}
    command = _script(tmp_path, **paths)
    undisturbed = _together(
        2, _script(tmp_path, **{**paths, "work": tmp_path / "other", "out": tmp_path / "two"}), tmp_path
    )
    assert undisturbed.returncode == 0
    command = _script(tmp_path, **paths)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    process = subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    while process.poll() is None and not _present(work, "00001"):
        time.sleep(0.001)
    for child in psutil.Process(process.pid).children()[1:]:
        child.kill()
    assert process.wait() != 0
    assert _together(2, command, tmp_path).returncode == 0
    _assert_same(load_file(tmp_path / "found" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors"))


def test_processes_with_different_memory_agree(tmp_path: Path) -> None:
    """Each alone would decide otherwise about what fits."""
    variant("llama").model().save_pretrained(tmp_path / "model")
    (tmp_path / "worker.py").write_text(
        f"""
import os, torch
from autoq import AutoQForCausalLM
from autoq.quantization import pipeline
pipeline.resident_bytes = lambda: 10**9 * int(os.environ["RANK"])
model = AutoQForCausalLM.from_pretrained({str(tmp_path / "model")!r})
ids = list(torch.randint(128, (8, 16)))
try:
    model.quantize(None, {{"group_size": 32}}, ids, max_calib_seq_len=16, max_memory="1GB", progress=False)
except Exception as error:
    print(type(error).__name__, error)
""",
        encoding="utf-8",
    )
    done = _together(2, [str(tmp_path / "worker.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("but max_memory allows 1,000.0 MB") == 2


def test_too_few_samples_for_the_processes_is_a_sentence(monkeypatch: Any) -> None:
    ranks = Ranks()
    ranks.size = 3
    with pytest.raises(AutoQError, match="3 processes share the calibration samples, but there are 2"):
        ranks.share(samples(2))
