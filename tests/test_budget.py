"""The memory that a run may take: settled before it begins, and kept to by what goes to the disk."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import variant
from runs import assert_same, in_memory, quantize, saved
from torch import Tensor

from autoq import AutoQForCausalLM, QuantConfig
from autoq.errors import ConfigError
from autoq.quantization import activations, budget, pipeline
from autoq.quantization.plan import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


def test_the_memory_is_settled_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = variant("llama")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(
        ConfigError, match=r"takes [\d,.]+ MB of memory.*max_memory allows 1\.0 MB.*device_map=\"disk\""
    ):
        quantize(model, max_memory="1MB")
    with pytest.raises(ConfigError, match="max_memory is 'much'"):
        quantize(model, max_memory="much")
    quantize(AutoQForCausalLM(case.model()), max_memory="100GB", progress=True)
    assert "quantizing takes about" in capsys.readouterr().out


def test_hidden_states_go_to_the_disk_when_memory_is_short(tmp_path: Path, monkeypatch: Any) -> None:
    model = variant("llama").model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    tokens = 10**6
    load = budget.Load(tokens, resident=budget.resident_bytes())
    settle = partial(budget.settle_memory, model, plan, load, work_dir=None)
    in_memory, on_disk = (budget.estimate(model, plan, load, way, True) for way in (True, False))
    assert in_memory.memory - on_disk.memory == pytest.approx(tokens * 64 * 4, rel=0.2)
    assert on_disk.disk - in_memory.disk == 3 * tokens * 64 * 4
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
    monkeypatch.setattr(budget, "_file_system", lambda path: int(path.is_relative_to(full)))
    with pytest.raises(ConfigError, match=r"full/statistics has 0\.0 MB left; give a statistics where there is more"):
        in_memory(variant("llama"), statistics=full / "statistics", work_dir=tmp_path / "work")


def test_what_goes_to_one_disk_has_to_fit_together(tmp_path: Path, monkeypatch: Any) -> None:
    model = variant("llama").model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    load = budget.Load(10**6, statistics=tmp_path / "statistics")
    found = budget.estimate(model, plan, load, False, True)
    needs = found.statistics, found.disk - found.statistics
    assert min(needs) > 10_000
    settle = partial(budget.settle_memory, model, plan, load, max_memory=None, work_dir=tmp_path / "work")
    for free, fits in ((sum(needs), True), (sum(needs) - 10_000, False)):
        usage = shutil._ntuple_diskusage(10**9, 10**9, free)
        monkeypatch.setattr(budget.shutil, "disk_usage", lambda _path, usage=usage: usage)
        if fits:
            settle()
        else:
            with pytest.raises(ConfigError, match="left; give a work_dir where there is more"):
                settle()


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

    def found(
        settings: dict[str, Any], in_memory: bool = True, keeps_results: bool = False, **load: Any
    ) -> budget.Estimate:
        plan = Plan.of(model, QuantConfig(group_size=32, **settings))
        return budget.estimate(model, plan, budget.Load(**{"tokens": 10**5, **load}), in_memory, keeps_results)

    grams = 4 * 2 * (3 * 64**2 + 128**2)
    kept = found({}, statistics=Path("statistics"))
    assert kept.disk - found({}).disk == kept.statistics == pytest.approx(grams, rel=0.5)
    assert found({}, longest=10**5).memory > found({}).memory
    assert found({}, held_out_tokens=10**5, longest=10**5).memory > found({}, held_out_tokens=10**5).memory
    assert found({}, device=torch.device("meta")).memory < found({}).memory
    assert found({}, resident=10**9).memory == found({}).memory + 10**9
    # Four processes have a quarter of the samples each, and the inputs of four blocks, beside those of the block
    # that is written and what the last one gives.
    alone, together = found({}, in_memory=False), found({}, in_memory=False, tokens=10**5 // 4, processes=4, width=4)
    assert together.disk == alone.disk // 3 * 6
    assert found({}, processes=4, width=4).memory > found({}).memory
    assert found({"effort": "best"}).memory > found({}).memory
    # Linears that are left alone stay in fp32 while the others are rounded, and as they were in what is written.
    alone = {"modules_to_not_convert": ["self_attn"]}
    assert found(alone).memory == found({}).memory
    assert found(alone, keeps_results=True).disk > found({}, keeps_results=True).disk


def test_hidden_states_on_the_disk_change_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    expected = in_memory(case)
    monkeypatch.setattr(pipeline, "settle_memory", lambda *_arguments, **_options: (True, None))
    kept = []
    write = activations.HiddenStates.write

    def note(self: activations.HiddenStates, batch: int, states: Tensor) -> None:
        write(self, batch, states)
        kept.append(len(self._batches))

    monkeypatch.setattr(activations.HiddenStates, "write", note)
    found = in_memory(case)
    assert kept
    assert set(kept) == {0}
    assert_same(saved(found, tmp_path / "found"), saved(expected, tmp_path / "expected"))
