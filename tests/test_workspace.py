"""Runs that are stopped and go on, and the directory that they keep their work in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
from families import samples, variant
from runs import SETTINGS, assert_same, in_memory, on_disk, present, quantize, saved, script
from safetensors.torch import load_file

from autoq import AutoQForCausalLM
from autoq.errors import AutoQError, CheckpointError, ConfigError
from autoq.quantization import activations, pipeline, workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


class _Stop(BaseException):
    """What no code catches by mistake."""


@pytest.mark.parametrize("disk", [False, True], ids=["in-memory", "on-disk"])
def test_a_run_stopped_at_any_write_goes_on_and_ends_with_the_same_bits(
    disk: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    case = variant("opt-gelu")
    make: Callable[..., AutoQForCausalLM] = (
        partial(on_disk, case, tmp_path / "model") if disk else partial(in_memory, case)
    )
    expected = make()
    wanted = saved(expected, tmp_path / "expected")
    writes, counting = 0, Lock()  # blocks are written by a thread of their own
    replace, save = os.replace, activations.save_file

    def counted(function: Callable[..., None], stop: int, when: str) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            nonlocal writes
            with counting:
                writes += 1
                is_last = writes == stop
            if is_last and when == "before":
                raise _Stop
            function(*arguments, **options)
            if is_last:
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
        assert_same(saved(found, tmp_path / f"found-{stop}"), wanted)
        shutil.rmtree(work)
    assert stop > 25


def test_a_block_is_written_while_the_next_one_is_observed(tmp_path: Path, monkeypatch: Any) -> None:
    """And what it was made of stays until it is written."""
    case, work = variant("llama"), tmp_path / "work"
    observe, save, forget = pipeline.observe, workspace.Workspace.save_block, pipeline.Streams.forget
    observed = [Event() for _ in case.model().model.layers]
    turns = iter(observed)
    forgotten = []

    def signalling(*arguments: Any) -> Any:
        next(turns).set()
        return observe(*arguments)

    def waiting(self: workspace.Workspace, index: int, *arguments: Any) -> None:
        if index + 1 < len(observed):
            assert observed[index + 1].wait(timeout=60), "the run does not go on"
        save(self, index, *arguments)

    def checking(self: Any, index: int) -> None:
        assert workspace.Workspace(work).finished(len(observed)) >= index
        forgotten.append(index)
        forget(self, index)

    monkeypatch.setattr(pipeline, "observe", signalling)
    monkeypatch.setattr(workspace.Workspace, "save_block", waiting)
    monkeypatch.setattr(pipeline.Streams, "forget", checking)
    in_memory(case, work_dir=work)
    assert forgotten == [*range(len(observed)), len(observed)]


def test_a_block_that_cannot_be_written_ends_the_run_before_the_next_search(tmp_path: Path, monkeypatch: Any) -> None:
    case, search = variant("llama"), pipeline.quantize_block
    last = len(case.model().model.layers) - 1
    for failing in (0, last):
        save, searched = workspace.Workspace.save_block, []

        def fails(self: workspace.Workspace, index: int, *arguments: Any) -> None:
            if index == failing:  # noqa: B023  (called before the loop goes on)
                raise CheckpointError("no room")
            save(self, index, *arguments)  # noqa: B023

        def counted(block: Any, prefix: str, *arguments: Any) -> Any:
            searched.append(prefix)  # noqa: B023
            return search(block, prefix, *arguments)

        monkeypatch.setattr(workspace.Workspace, "save_block", fails)
        monkeypatch.setattr(pipeline, "quantize_block", counted)
        work = tmp_path / f"work-{failing}"
        with pytest.raises(CheckpointError, match="no room"):
            in_memory(case, work_dir=work)
        assert len(searched) == failing + 1
        monkeypatch.undo()
        assert_same(saved(in_memory(case, work_dir=work), tmp_path / "found"), saved(in_memory(case), tmp_path / "new"))


def test_a_finished_run_is_taken_up_without_searching_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("mpt")
    expected = saved(in_memory(case, work_dir=tmp_path / "work"), tmp_path / "expected")
    monkeypatch.setattr(pipeline, "quantize_block", lambda *_arguments: pytest.fail("searched again"))
    monkeypatch.setattr(pipeline, "observe", lambda *_arguments: pytest.fail("observed again"))
    assert_same(saved(in_memory(case, work_dir=tmp_path / "work"), tmp_path / "found"), expected)


def test_lost_hidden_states_are_computed_again(tmp_path: Path) -> None:
    case = variant("llama")
    expected = saved(in_memory(case, work_dir=tmp_path / "work"), tmp_path / "expected")
    shutil.rmtree(next((tmp_path / "work").glob("activations-*")))
    (tmp_path / "work" / "block-00001.safetensors").unlink()
    assert_same(saved(in_memory(case, work_dir=tmp_path / "work"), tmp_path / "found"), expected)


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    case = variant("llama")
    in_memory(case, work_dir=tmp_path / "work")
    other = AutoQForCausalLM(case.model(seed=1))
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("the setting bits", lambda: in_memory(case, settings={**SETTINGS, "bits": 3}, work_dir=tmp_path / "work")),
        ("calibration samples", lambda: in_memory(case, calib_data=samples(20, seed=3), work_dir=tmp_path / "work")),
        ("model", lambda: quantize(other, work_dir=tmp_path / "work")),
        ("held-out samples", lambda: in_memory(case, max_eval_samples=3, work_dir=tmp_path / "work")),
    ]
    for what, change in changes:
        with pytest.raises(ConfigError, match=rf"holds the work of another run: .*{what}.* differ"):
            change()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ConfigError, match="photos holds files that are not of a quantization"):
        in_memory(case, work_dir=tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be used as the work_dir"):
        in_memory(case, work_dir=tmp_path / "file")


def test_a_finished_run_that_wrote_its_findings_is_taken_up(tmp_path: Path) -> None:
    case = variant("llama")
    run = {name: tmp_path / name for name in ("work_dir", "statistics", "awq_cache")}
    expected = saved(in_memory(case, **run), tmp_path / "expected")
    assert_same(saved(in_memory(case, **run), tmp_path / "found"), expected)
    (tmp_path / "work_dir" / "block-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match="statistics collected earlier, search results differ"):
        in_memory(case, **run)


def test_a_damaged_block_is_a_sentence(tmp_path: Path) -> None:
    case = variant("llama")
    in_memory(case, work_dir=tmp_path / "work")
    path = tmp_path / "work" / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors is damaged .*delete it"):
        in_memory(case, work_dir=tmp_path / "work")
    path.unlink()
    in_memory(case, work_dir=tmp_path / "work")


@pytest.mark.parametrize("effort", ["default", "best"])
def test_a_killed_process_loses_nothing(effort: str, tmp_path: Path) -> None:
    case = variant("llama")
    settings = {**SETTINGS, "effort": effort}
    expected = saved(on_disk(case, tmp_path / "model", settings=settings), tmp_path / "expected")
    work = tmp_path / "work"
    command = [sys.executable, *script(tmp_path, effort, model=tmp_path / "model", work=work, out=tmp_path / "found")]
    for files in (1, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(present(work, "*.safetensors")) < files:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was not done
    subprocess.run(command, check=True, capture_output=True)
    assert_same(load_file(tmp_path / "found" / "model.safetensors"), expected)


def test_a_disk_that_fills_up_is_a_sentence_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    case = variant("llama")
    expected = saved(in_memory(case), tmp_path / "expected")
    for module, place in ((workspace, r"block-00001\.safetensors"), (activations, "activations-0-of-1.*")):
        save, count = module.save_file, 0

        def fills(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise OSError(28, "No space left on device")
            save(*arguments, **options)  # noqa: B023  (called before the loop goes on)

        work = tmp_path / f"work-{module.__name__}"
        monkeypatch.setattr(module, "save_file", fills)
        with pytest.raises(CheckpointError, match=rf"{place} could not be written .*No space left.*is kept"):
            in_memory(case, work_dir=work)
        monkeypatch.undo()
        assert not list(work.glob(".*"))
        assert_same(saved(in_memory(case, work_dir=work), tmp_path / f"found-{module.__name__}"), expected)


def test_places_that_cannot_be_written_are_known_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, path in (("awq_cache", "file/cache.pt"), ("statistics", "file/statistics"), ("work_dir", "file/work")):
        model = AutoQForCausalLM(variant("llama").model())
        with pytest.raises(AutoQError, match="file"):
            quantize(model, **{name: tmp_path / path})
        model(samples(1)[0][None])  # still a model
    with pytest.raises(ConfigError, match="work_dir is 5; it should be a path"):
        quantize(model, work_dir=5)


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    case = variant("llama")
    in_memory(case, settings={"group_size": 32}, statistics=tmp_path / "statistics")
    model = AutoQForCausalLM(case.model())
    with pytest.raises(ConfigError, match="were collected without lm_head"):
        quantize(model, statistics=tmp_path / "statistics", work_dir=tmp_path / "work")
    in_memory(case, work_dir=tmp_path / "work")
    other = tmp_path / "other"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").touch()
    with pytest.raises(ConfigError, match="holds files that are not statistics"):
        quantize(model, statistics=foreign)
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]
    with pytest.raises(ConfigError, match="was begun without statistics"):
        quantize(model, statistics=other, work_dir=tmp_path / "work")
    assert not other.exists()
    # Tuning reads no statistics: it does not miss the head's.
    best = {**SETTINGS, "effort": "best"}
    quantize(AutoQForCausalLM(case.model()), best, statistics=tmp_path / "statistics", max_calib_samples=2)
