"""The benchmarks run, on models so small that their figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_gpu_models_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "gpu_models.py", "--shape", "tiny", "--output", tmp_path / "models"]
    sizes = ["--batch", "1", "2", "--depth", "0", "40", "--compile-batch"]
    subprocess.run([*script, *sizes, "--device", "cpu"], check=True, timeout=280)
    results = json.loads((tmp_path / "models.json").read_text())
    engines = {record["engine"] for record in results["records"]}
    assert engines == {"transformers fp16", "autoq 4 bits"}
    assert len(results["records"]) == 2 * (4 + 1 + 2)
    assert all(record["recorded_steps"] > 0 for record in results["records"] if record["engine"] == "autoq 4 bits")
    assert not results["left_out"]
    assert "| tiny | decode | 2 | 40 | autoq 4 bits |" in (tmp_path / "models.md").read_text()


def test_long_generation_measures_every_window(tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "long_generation.py", "--shape", "tiny", "--output", tmp_path / "long"]
    subprocess.run([*script, "--tokens", "48", "--window", "16", "--rounds", "1"], check=True, timeout=280)
    windows = json.loads((tmp_path / "long.json").read_text())
    assert [window["tokens"] for window in windows] == [16, 32, 48]
    assert all(window["ms"] > 0 and window["resident_bytes"] > 1e8 for window in windows)
    assert windows[-1]["cache_bytes"] == 48 * 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, head size, bytes
    assert "| 48 |" in (tmp_path / "long.md").read_text()


def test_loading_measures_both_states_of_the_files(tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "loading.py", "--shape", "tiny", "--work", tmp_path]
    subprocess.run([*script, "--rounds", "1", "--output", tmp_path / "loading"], check=True, timeout=280)
    results = json.loads((tmp_path / "loading.json").read_text())
    assert results["rounds"][0]["cached"]
    assert all(entry[part] > 0 for entry in results["rounds"] for part in ("read", "load", "first token"))
    text = (tmp_path / "loading.md").read_text()
    assert "| in the page cache |" in text
    assert "--shape tiny --rounds 1" in text


def test_cpu_peers_measures_what_is_installed(tmp_path: Path) -> None:
    output = tmp_path / "peers"
    command = [sys.executable, BENCHMARKS / "cpu_peers.py", "--quick", "--rounds", "1", "--threads", "1"]
    subprocess.run([*command, "--output", output, "--work", tmp_path], check=True, timeout=280)
    results = json.loads(output.with_suffix(".json").read_text())
    engines = results["engines"]
    assert {"autoq", "transformers bf16"} <= engines.keys()
    assert all(engine["correlation"] > 0.9 for engine in engines.values())
    assert {record["engine"] for record in results["decode"]} == engines.keys()
    assert {record["engine"] for record in results["prefill"]} == engines.keys()
    exact = [r["errors"]["gaussian"] for r in results["matmul"] if r["engine"] == "autoq, fp32 activations"]
    assert exact
    assert max(exact) < 1e-6
    text = output.with_suffix(".md").read_text()
    assert "| autoq |" in text
    assert str(tmp_path) not in text + json.dumps(results)
