"""Mixed precision: how much each linear matters, and checkpoints of several widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import samples, variant
from torch import nn

from autoq import AutoQForCausalLM, QuantConfig
from autoq.errors import ConfigError
from autoq.quantization import pipeline
from autoq.quantization.plan import Plan
from autoq.quantization.sensitivity import measure_sensitivities
from autoq.quantization.weight import fake_quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


@pytest.mark.parametrize("name", ["llama", "falcon-multi-query"])
def test_sensitivity_is_the_change_of_the_blocks_output(name: str) -> None:
    case = variant(name)
    model = case.model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    data = samples(2, 16, seed=5)
    found = measure_sensitivities(model, plan, data)
    assert found.keys() == plan.specs.keys()

    def outputs(index: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        block = plan.architecture.decoder_blocks(model)[index]

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(note)
        with torch.no_grad():
            model(torch.stack(data))
        handle.remove()
        return seen[0]

    for full_name, spec in list(plan.specs.items())[:: len(plan.specs) // 4]:
        index = int(full_name.removeprefix(f"{plan.architecture.blocks}.").split(".")[0])
        linear = model.get_submodule(full_name)
        expected, own = outputs(index), linear.weight.data
        linear.weight.data = fake_quantize(own, 3, spec.group_size, spec.zero_point)
        changed = outputs(index)
        linear.weight.data = own
        ratio = (changed - expected).square().sum(-1) / expected.square().sum(-1)
        assert found[full_name][3] == pytest.approx(float(ratio.mean()), rel=1e-3)
        assert found[full_name][2] > found[full_name][3] > found[full_name][4] > found[full_name][8] > 0


@pytest.mark.parametrize("disk", [False, True], ids=["in-memory", "on-disk"])
def test_a_model_of_several_widths_is_saved_and_loaded(disk: bool, tmp_path: Path) -> None:
    case = variant("llama-gqa")
    case.model().save_pretrained(tmp_path / "model")
    model = AutoQForCausalLM.from_pretrained(tmp_path / "model", device_map="disk" if disk else None)
    report = model.quantize(
        None, {"target_bits": 3.5, "group_size": 32}, samples(), max_calib_seq_len=32, progress=False
    )
    linears = {entry.name: entry.bits for entry in report.quantized}
    sizes = {name: case.model().get_submodule(name).weight.numel() for name in linears}
    assert len(set(linears.values())) > 1
    mean = sum(linears[name] * sizes[name] for name in linears) / sum(sizes.values())
    assert 3.2 < mean <= 3.5
    model.save_quantized(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["version"], config["quant_method"]) == ("dense", "autoq")
    assert {**dict.fromkeys(linears, config["bits"]), **config["module_bits"]} == linears
    again = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="cpu")
    prompt = samples(1)[0][None]
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    assert again.quant_config == model.quant_config
    assert "Quantized to 3 or 4 bits" in (tmp_path / "out" / "README.md").read_text()


def test_the_measurement_is_kept_with_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    def run() -> AutoQForCausalLM:
        model = AutoQForCausalLM(variant("opt").model())
        settings = {"target_bits": 3.5, "group_size": 32}
        model.quantize(None, settings, samples(), max_calib_seq_len=32, progress=False, work_dir=tmp_path / "work")
        return model

    expected = run()
    monkeypatch.setattr(pipeline, "measure_sensitivities", lambda *_arguments: pytest.fail("measured again"))
    (tmp_path / "work" / "block-00001.safetensors").unlink()
    assert run().report.linears == expected.report.linears


@pytest.mark.parametrize("settings", [{"target_bits": 9}, {"target_bits": 1.9}, {"target_bits": "4"}])
def test_bad_targets_are_sentences(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"target_bits is .* a number from 2 to 8"):
        QuantConfig.from_dict(settings)


def test_the_gemm_format_holds_no_mixture() -> None:
    with pytest.raises(ConfigError, match="4-bit weights only, not mixed-bit ones"):
        QuantConfig(target_bits=4.25, version="gemm")
    with pytest.raises(ConfigError, match=r"module_bits\['a'\] is 5"):
        QuantConfig(module_bits={"a": 5})
    assert QuantConfig(module_bits={"a": 3}).version == "dense"
