"""Results that are judged: on held-out text, and by whether folding changed a block."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Variant, samples, variant
from runs import DATA, in_memory, quantize
from torch import Tensor, nn

from autoq import AutoQForCausalLM
from autoq.errors import CalibrationError, ConfigError, QuantizationError
from autoq.evaluation.divergence import compare
from autoq.quantization import awq
from autoq.quantization import search as searching

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


@pytest.mark.parametrize("name", ["llama-tied", "bloom", "gptj"])
def test_the_held_out_figures_are_those_of_comparing_the_models(name: str) -> None:
    case = variant(name)
    held_out = samples(5, 32, seed=8)
    model = in_memory(case, eval_data=held_out)
    found = model.report.held_out
    expected = compare(case.model(), model, None, torch.cat(held_out), 32, progress=False)
    assert found.tokens == 5 * 32
    assert found.kl_divergence == pytest.approx(expected.divergence.value, rel=1e-3)
    assert found.top1_agreement == expected.divergence.top1_agreement
    assert found.perplexity_before == pytest.approx(expected.reference.value, rel=1e-5)
    assert found.perplexity_after == pytest.approx(expected.model.value, rel=1e-4)


def test_held_out_text_is_what_the_calibration_leaves_over() -> None:
    case = variant("llama")
    model = in_memory(case, max_eval_samples=3)
    assert model.report.tokens == 12 * 32
    assert model.report.held_out.tokens == 3 * 32
    assert model.report.held_out.kl_divergence == pytest.approx(
        in_memory(case, calib_data=DATA[:12], eval_data=DATA[12:15]).report.held_out.kl_divergence
    )
    assert in_memory(case, max_eval_samples=0).report.held_out is None
    assert in_memory(case, calib_data=DATA[:12]).report.held_out is None
    assert "held-out text (96 tokens" in str(model.report)


def test_bad_results_are_not_saved_silently(tmp_path: Path) -> None:
    model = in_memory(variant("llama"), settings={"bits": 2, "group_size": 32}, max_kl=1e-4)
    message = r"KL divergence .* is [\d.]+ on held-out text, beyond max_kl=0\.0001; .*largest output errors are model"
    with pytest.raises(QuantizationError, match=message):
        model.save_quantized(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_quantized(tmp_path / "out", ignore_max_kl=True)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["held_out"]["kl_divergence"] > report["max_kl"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"KL divergence {report['held_out']['kl_divergence']:.3g}" in card
    in_memory(variant("llama"), max_kl=5.0).save_quantized(tmp_path / "fine")


def test_nan_predictions_are_beyond_any_limit() -> None:
    report = in_memory(variant("llama"), max_kl=5.0).report
    report.held_out = dataclasses.replace(report.held_out, kl_divergence=math.nan)
    with pytest.raises(QuantizationError, match="is nan"):
        report.check_quality()


@pytest.mark.parametrize("value", [0, -1.0, "small", True])
def test_max_kl_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_kl is"):
        in_memory(variant("llama"), max_kl=value)


def test_max_kl_needs_held_out_text() -> None:
    with pytest.raises(ConfigError, match=r"max_kl needs text.*eval_data"):
        in_memory(variant("llama"), calib_data=DATA[:12], max_kl=0.1)


@pytest.mark.parametrize("value", [0, -5, True, "128", None, 1.5])
def test_numbers_of_samples_are_checked(value: Any) -> None:
    with pytest.raises(CalibrationError, match=r"max_calib_samples is .*; it should be a number of at least 1"):
        in_memory(variant("llama"), max_calib_samples=value)


def test_the_share_of_clipped_weights_is_reported() -> None:
    report = in_memory(variant("llama"), settings={"bits": 2, "group_size": 32}).report
    shares = {entry.name.rpartition(".")[2]: entry.clipped for entry in report.quantized}
    assert shares["q_proj"] == shares["k_proj"] == 0
    assert 0 < shares["up_proj"] < 0.5


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_is_found_exact_in_every_variant(case: Variant, dtype: torch.dtype) -> None:
    quantize(AutoQForCausalLM(case.model().to(dtype)), {"group_size": 16, "bits": 3, "scale_activations": True})


def test_a_block_that_folding_changes_is_refused(monkeypatch: Any) -> None:
    """As in a family whose description forgets that something else reads what a norm gives."""

    def forgetful(prev: nn.Module, linears: Any, scale: Tensor, rows: Tensor | None = None) -> Tensor:
        return fold(prev, linears[:1], scale, rows)

    fold = awq.fold_scale
    monkeypatch.setattr(searching.awq, "fold_scale", forgetful)
    with pytest.raises(
        QuantizationError, match=r"folding the scales changes the output of model\.layers\.0 by [\d.]+%"
    ):
        in_memory(variant("llama"))
