"""Runs that several processes share."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import Variant, samples, variant
from runs import SETTINGS, assert_same, on_disk, present, saved, script
from safetensors.torch import load_file

from autoq import QuantConfig
from autoq.errors import AutoQError, ConfigError, QuantizationError
from autoq.quantization.pipeline import Quantizer
from autoq.quantization.plan import Plan
from autoq.quantization.ranks import Ranks
from autoq.quantization.streams import Streams
from autoq.quantization.workspace import Workspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


def _together(count: int, command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, capture_output=True, text=True, cwd=directory, env=environment, timeout=300)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work(count: int, tmp_path: Path) -> None:
    expected = saved(on_disk(variant("llama"), tmp_path / "model"), tmp_path / "expected")
    paths = {"model": tmp_path / "model", "work": tmp_path / "work", "out": tmp_path / "found"}
    done = _together(count, script(tmp_path, **paths), tmp_path)
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


def test_processes_tune_blocks_on_the_samples_of_all(tmp_path: Path) -> None:
    settings = {**SETTINGS, "effort": "best"}
    expected = on_disk(variant("llama"), tmp_path / "model", settings=settings)
    paths = {"model": tmp_path / "model", "work": tmp_path / "work", "out": tmp_path / "found"}
    done = _together(2, script(tmp_path, "best", **paths), tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found" / "quantization_report.json").read_text())
    # The same samples in other batches, of which each step takes one: near, but not the same.
    assert report["held_out"]["kl_divergence"] == pytest.approx(expected.report.held_out.kl_divergence, rel=0.15)


def test_tuning_batches_are_those_of_all_processes(tmp_path: Path) -> None:
    model = variant("llama").model()
    plan = Plan.of(model, QuantConfig.from_dict({"group_size": 32, "effort": "best"}))
    workspace, ranks, whole = Workspace(tmp_path), Ranks(), samples(12)
    ranks.size = 2
    shares = [(ranks.share(whole, rank=rank), workspace.activations_path(rank, 2)) for rank in range(2)]
    streams = []
    for rank, (share, folder) in enumerate(shares):
        streams.append(Streams(model, plan, share, whole[0], (), folder, 0, peers=[shares[1 - rank]]))
    for stream in streams:
        for rows in (stream.through_full, stream.through_quantized):
            rows(0, model.model.layers[0], torch.device("cpu"))
    first, second = (stream.tuning_batches() for stream in streams)
    assert len(first) == len(second)
    tokens = sum(batch.inputs.shape[0] * batch.inputs.shape[1] for batch in first)
    assert tokens == sum(map(len, whole))
    assert {float(batch.target.sum()) for batch in first} == {float(batch.target.sum()) for batch in second}


def test_tuning_together_needs_a_work_dir(monkeypatch: Any) -> None:
    monkeypatch.setattr(Ranks, "__init__", lambda self: vars(self).update(rank=0, size=2))
    with pytest.raises(ConfigError, match=r"tune each block on the samples of all.*give them one work_dir"):
        Quantizer(variant("llama").model(), QuantConfig.from_dict({"effort": "best", "group_size": 32}), None)


@pytest.mark.parametrize(("effort", "blocks"), [("default", 6), ("best", 3)])
def test_a_lost_process_leaves_work_that_is_resumed(effort: str, blocks: int, tmp_path: Path) -> None:
    config = copy.deepcopy(variant("llama").config)
    config.num_hidden_layers = blocks
    Variant("deep", config).model().save_pretrained(tmp_path / "model")
    work = tmp_path / "work"
    paths = {"model": tmp_path / "model", "work": work, "out": tmp_path / "found"}
    undisturbed = script(tmp_path, effort, **{**paths, "work": tmp_path / "other", "out": tmp_path / "two"})
    assert _together(2, undisturbed, tmp_path).returncode == 0
    command = script(tmp_path, effort, **paths)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    process = subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    while process.poll() is None and not present(work, "block-00001.safetensors"):
        time.sleep(0.001)
    for child in psutil.Process(process.pid).children()[1:]:
        child.kill()
    assert process.wait() != 0
    assert 0 < len(present(work, "block-*.safetensors")) < blocks
    assert _together(2, command, tmp_path).returncode == 0
    assert_same(load_file(tmp_path / "found" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors"))


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


def test_an_error_of_one_process_is_the_same_in_all(monkeypatch: Any) -> None:
    ranks = Ranks()
    ranks.size = 2
    for error, kind, message in (
        (ConfigError("no"), ConfigError, "no"),
        (ZeroDivisionError("x"), QuantizationError, "process 1 met a ZeroDivisionError: x"),
    ):
        told = (type(error).__name__, str(error))
        monkeypatch.setattr(ranks, "tell", lambda _value, _owner, told=told: told)
        with pytest.raises(kind, match=f"^{message}$"):
            ranks.agree(None, 1)


def test_too_few_samples_for_the_processes_is_a_sentence(monkeypatch: Any) -> None:
    ranks = Ranks()
    ranks.size = 3
    with pytest.raises(AutoQError, match="3 processes share the calibration samples, but there are 2"):
        ranks.share(samples(2))
