"""Statistics that are kept, and serve other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import samples, variant
from runs import SETTINGS, assert_same, in_memory, quantize, saved
from safetensors.torch import load_file

from autoq import AutoQForCausalLM
from autoq.errors import CheckpointError, ConfigError
from autoq.quantization import pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


def test_statistics_serve_other_bits_and_group_sizes(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("falcon-multi-query")
    other = {**SETTINGS, "bits": 3, "group_size": 16}
    expected = in_memory(case, settings=other)
    in_memory(case, statistics=tmp_path / "statistics")
    monkeypatch.setattr(pipeline, "observe", lambda *_arguments: pytest.fail("calibrated again"))
    monkeypatch.setattr("autoq.quantization.head.observe_head", lambda *_arguments: pytest.fail("calibrated again"))
    found = in_memory(case, settings=other, statistics=tmp_path / "statistics")
    assert found.report.linears == expected.report.linears
    assert found.report.calibration == f"{expected.report.calibration} (statistics collected earlier)"
    assert_same(saved(found, tmp_path / "found"), saved(expected, tmp_path / "expected"))
    with pytest.raises(ConfigError, match=r"the statistics in .* are of another model"):
        quantize(AutoQForCausalLM(case.model(seed=1)), statistics=tmp_path / "statistics")
    (tmp_path / "statistics" / "block-00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors is missing or damaged"):
        in_memory(case, statistics=tmp_path / "statistics")


def test_a_stopped_run_goes_on_with_the_statistics_it_began_with(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    other, first, second = samples(20, seed=4), tmp_path / "first", tmp_path / "second"
    judged = {"eval_data": samples(4, seed=5)}
    in_memory(case, statistics=first, **judged)
    in_memory(case, statistics=second, calib_data=other, **judged)
    expected = saved(in_memory(case, statistics=first, **judged), tmp_path / "expected")

    def stop(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize_head", stop)
    with pytest.raises(KeyboardInterrupt):
        in_memory(case, statistics=first, work_dir=tmp_path / "work", **judged)
    monkeypatch.undo()
    (tmp_path / "work" / "block-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="the work of another run: calibration samples differ"):
        in_memory(case, statistics=second, work_dir=tmp_path / "work", **judged)
    # Calibration data that is not used makes no difference.
    found = in_memory(case, statistics=first, work_dir=tmp_path / "work", calib_data=other, **judged)
    assert_same(saved(found, tmp_path / "found"), expected)


def test_statistics_without_the_heads_do_not_serve_the_head(tmp_path: Path) -> None:
    case = variant("llama")
    in_memory(case, settings={"group_size": 32}, statistics=tmp_path / "statistics")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(ConfigError, match="were collected without lm_head"):
        quantize(model, statistics=tmp_path / "statistics")
    quantize(model, {"group_size": 32})  # nothing was begun


def test_kept_statistics_are_neither_mixed_nor_written_over(tmp_path: Path) -> None:
    case = variant("llama")
    kept = tmp_path / "statistics"
    in_memory(case, statistics=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    in_memory(case, settings={**SETTINGS, "effort": "best"}, calib_data=samples(20, seed=4), statistics=kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    # A run that was begun without keeping them cannot keep those of the blocks it has done.
    in_memory(case, work_dir=tmp_path / "work")
    with pytest.raises(ConfigError, match=r"begun without statistics=.*, which lacks block-00000"):
        in_memory(case, work_dir=tmp_path / "work", statistics=tmp_path / "new")
    # What a stopped run left is of its own data only.
    content = json.loads((kept / "statistics.json").read_text())
    (kept / "statistics.json").write_text(json.dumps({**content, "names": []}))
    with pytest.raises(ConfigError, match="holds a part of the statistics of other calibration data"):
        in_memory(case, calib_data=samples(20, seed=4), statistics=kept)
    earlier = load_file(kept / "block-00001.safetensors")
    in_memory(case, statistics=kept)
    assert_same(load_file(kept / "block-00001.safetensors"), earlier)
