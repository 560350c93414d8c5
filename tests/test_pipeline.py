"""Quantizing whole models: what comes out, what is refused, what is reported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, Variant, quantized, samples, variant
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config

from autoq import AutoQForCausalLM, QuantConfig
from autoq.architectures import architecture_of
from autoq.architectures.base import named_linears
from autoq.errors import AutoQError, ConfigError, QuantizationError
from autoq.nn import QuantLinear, ScaledActivation
from autoq.placement import byte_count
from autoq.quantization import activations as activations_module
from autoq.quantization import search, tuning
from autoq.quantization.activations import Activations, observe
from autoq.quantization.plan import Plan
from autoq.quantization.statistics import InputStatistics
from autoq.quantization.weight import fake_quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


def _logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.stack(samples(4, 32, seed=9))).logits
    return logits.float()


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
@pytest.mark.parametrize("scale_activations", [False, True])
def test_every_variant_comes_out_near_the_original(case: Variant, scale_activations: bool) -> None:
    model = quantized(case, bits=8, scale_activations=scale_activations)
    expected, found = _logits(case.model()), _logits(model)
    assert (found - expected).norm() / expected.norm() < 0.03
    linears = [module for module in model.modules() if isinstance(module, (QuantLinear, nn.Linear))]
    assert sum(isinstance(module, QuantLinear) for module in linears) == len(model.report.quantized) > 0
    has_groups = any(group.activation for group in architecture_of(case.config).groups(case.config, True))
    scaled = [module for module in model.modules() if isinstance(module, ScaledActivation)]
    assert bool(scaled) == (scale_activations and has_groups)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_the_search_beats_round_to_nearest_on_the_calibration_data(case: Variant, bits: int, zero_point: bool) -> None:
    report = quantized(case, bits=bits, zero_point=zero_point).report
    assert report is not None
    for linear in report.quantized:
        assert (linear.bits, linear.group_size, linear.tokens) == (bits, 32, 12 * 32)
        assert linear.error_after > 0
    # Scales are chosen for a group of linears together, clipping group by group: the sum is what must not grow.
    before = sum(linear.error_before for linear in report.quantized)
    after = sum(linear.error_after for linear in report.quantized)
    assert after < before


def test_without_a_search_it_is_round_to_nearest() -> None:
    case = variant("llama-gqa")
    model = quantized(case, apply_scale=False, apply_clip=False, compensate=False)
    weight = case.model().get_submodule("model.layers.1.mlp.down_proj").weight
    found = model.model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert torch.equal(found, fake_quantize(weight, 4, 32).to(found.dtype))
    for linear in model.report.quantized:
        assert linear.error_after == pytest.approx(linear.error_before, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_searched_in_fp32(dtype: torch.dtype) -> None:
    case = variant("llama-gqa")
    low = quantized(case, dtype=dtype)
    full = quantized(case)
    assert low.model.dtype == dtype
    for one, other in zip(low.report.quantized, full.report.quantized, strict=True):
        assert one.error_after == pytest.approx(other.error_after, rel=0.15)
    # At 8 bits what is left is the rounding of the activations, which the plain model has too.
    expected = _logits(case.model())
    plain = (_logits(case.model().to(dtype)) - expected).norm()
    assert (_logits(quantized(case, dtype=dtype, bits=8)) - expected).norm() < 1.5 * plain + 0.03 * expected.norm()


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_slow_dtypes_are_run_in_fp32(case: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without units for fp16 sees the numbers of an fp32 model that has the fp16 model's weights."""
    seen = []
    low = case.model().half()
    full = copy.deepcopy(low).float()
    monkeypatch.setattr(activations_module, "has_units", lambda dtype, _device: dtype != torch.float16)

    def statistics(model: PreTrainedModel) -> dict[str, InputStatistics]:
        plan = Plan.of(model, QuantConfig(group_size=32))
        activations = Activations(model, plan, samples())
        block = plan.architecture.decoder_blocks(model)[0]
        before = {name: value.dtype for name, value in block.state_dict().items()}
        found = observe(block, activations, plan)
        assert {name: value.dtype for name, value in block.state_dict().items()} == before
        seen.append(activations.states.read(0).dtype)
        return found

    with torch.no_grad():
        found, expected = statistics(low), statistics(full)
    assert seen == [torch.float16, torch.float32]
    for leader, entry in found.items():
        # The block's input is rounded to fp16, and nothing behind it.
        error = (entry.gram - expected[leader].gram).norm() / expected[leader].gram.norm()
        assert error < 1e-3, leader


def test_two_runs_are_identical() -> None:
    one, other = quantized(variant("gptj")), quantized(variant("gptj"))
    for (name, tensor), (_, again) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, again), name


def test_group_size_that_does_not_divide_takes_a_smaller_one_or_leaves_the_linear_alone() -> None:
    case = variant("llama-gqa")  # 64 and 96 wide
    smaller = quantized(case, group_size=64)
    sizes = {linear.name.rpartition(".")[2]: linear.group_size for linear in smaller.report.quantized}
    assert sizes == {
        "q_proj": 64,
        "k_proj": 64,
        "v_proj": 64,
        "o_proj": 64,
        "gate_proj": 64,
        "up_proj": 64,
        "down_proj": 32,
    }
    assert all("does not divide" in entry.note for entry in smaller.report.quantized if entry.group_size == 32)
    assert set(smaller.quant_config.module_group_sizes.values()) == {32}
    with pytest.warns(UserWarning, match=r"group size 64 does not divide the inputs of 2 linears.*group_size=32"):
        quantized(case, group_size=64)
    skipped = quantized(case, group_size=64, indivisible="skip")
    assert {entry.name for entry in skipped.report.skipped} == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert set(skipped.quant_config.modules_to_not_convert) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert "does not divide 96 inputs" in str(skipped.report)
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        quantized(case, group_size=256, indivisible="skip")


def test_one_smaller_group_size_for_all_is_the_group_size() -> None:
    model = quantized(variant("gptj"), group_size=128)  # 64 and 256 wide
    assert model.quant_config.module_group_sizes
    only = quantized(variant("gptj"), group_size=128, modules_to_not_convert=["fc_out"])
    assert (only.quant_config.group_size, only.quant_config.module_group_sizes) == (64, {})


def test_modules_to_not_convert_stay_as_they_are() -> None:
    case = variant("llama-gqa")
    model = quantized(case, modules_to_not_convert=["down_proj", "v_proj", "layers.0.self_attn.q_proj"])
    kept = {entry.name for entry in model.report.skipped}
    assert len(kept) == 2 * 2 + 1
    original = case.model()
    for name in kept:
        assert torch.equal(model.model.get_submodule(name).weight, original.get_submodule(name).weight), name
    with pytest.warns(UserWarning, match="no linear of the blocks has 'q_porj' in its name"):
        quantized(case, modules_to_not_convert=["q_porj", "lm_head"])


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_each_effort_beats_the_one_below(case: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 60)
    tokens = torch.stack(samples())

    def output(model: nn.Module) -> Tensor:
        """What the last block gives on the calibration data."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = model.get_submodule(_blocks(case))[-1].register_forward_hook(keep)
        with torch.inference_mode():
            model(tokens)
        hook.remove()
        return found[0]

    expected = output(case.model())
    models = {effort: quantized(case, bits=3, effort=effort) for effort in ("fast", "default", "best")}
    errors = {effort: float((output(model.model) - expected).square().sum()) for effort, model in models.items()}
    assert errors["default"] < errors["fast"]
    assert errors["best"] < 0.9 * errors["default"]
    reports = {effort: model.report for effort, model in models.items()}
    assert len({len(report.quantized) for report in reports.values() if report is not None}) == 1


@pytest.mark.parametrize("name", ["llama-gqa", "opt-gelu", "bloom-norm-residual", "gptj"])
def test_the_best_effort_takes_half_precision_and_linears_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 4)
    case = variant(name)
    alone = next(leaf for leaf, _ in named_linears(case.model().get_submodule(_blocks(case))[1]))
    left = f"{_blocks(case)}.1.{alone}"
    model = quantized(
        case, dtype=torch.float16, bits=8, effort="best", scale_activations=True, modules_to_not_convert=[left]
    )
    assert torch.equal(model.model.get_submodule(left).weight, case.model().half().get_submodule(left).weight)
    assert {value.dtype for value in model.model.parameters()} == {torch.float16}
    expected, found = _logits(case.model()), _logits(model)
    assert (found - expected).norm() / expected.norm() < 0.03


def _blocks(case: Variant) -> str:
    return architecture_of(case.config).blocks


def test_an_interrupted_run_leaves_a_model_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    model = AutoQForCausalLM(variant("llama-gqa").model())
    monkeypatch.setattr(search, "round_linear", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.quantize(None, {"group_size": 32}, samples(), max_calib_seq_len=32, progress=False)
    uses = (
        lambda: model(samples(1)[0][None]),
        lambda: model.generate(samples(1)[0][None]),
        lambda: model.save_quantized(tmp_path),
        lambda: model.quantize(None, {}, samples()),
    )
    for use in uses:
        with pytest.raises(ConfigError, match="interrupted"):
            use()


def test_dropout_is_off_while_calibrating() -> None:
    model = AutoQForCausalLM(variant("opt").model().train())
    report = model.quantize(None, {"group_size": 32}, samples(), max_calib_seq_len=32, progress=False)
    expected = quantized(variant("opt")).report
    assert [entry.error_after for entry in report.linears] == [entry.error_after for entry in expected.linears]
    assert model.model.training


def test_samples_are_cut_to_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoQForCausalLM(variant("opt").model())  # 128 learned positions
    report = model.quantize(None, {"group_size": 32}, samples(4, 300), progress=False)
    assert "cut to 128 tokens" in capsys.readouterr().out
    assert {entry.tokens for entry in report.quantized} == {4 * 300 // 128 * 128}


def test_sliding_and_full_attention_get_their_own_masks() -> None:
    settings = {
        **variant("qwen2").config.to_dict(),
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    case = Variant("sliding", Qwen2Config(**settings))
    model = case.model()
    seen: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.stack(samples()))
    inputs = seen[0].reshape(-1, seen[0].shape[-1])

    model = case.model()
    plan = Plan.of(model, QuantConfig(group_size=32))
    with torch.no_grad():
        activations = Activations(model, plan, samples())
        for block in model.model.layers:
            statistics = observe(block, activations, plan)
    torch.testing.assert_close(statistics["mlp.down_proj"].gram, inputs.T @ inputs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings", [{"group_size": 32}, QuantConfig(group_size=32)])
def test_settings_can_be_keywords(settings: Any) -> None:
    model = AutoQForCausalLM(variant("llama-gqa").model())
    model.quantize(None, settings, samples(), max_calib_seq_len=32, progress=False, bits=3, export_compatible=False)
    assert (model.quant_config.bits, model.quant_config.group_size, model.quant_config.version) == (3, 32, "dense")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_and_activations_name_the_layer(bad: float) -> None:
    model = AutoQForCausalLM(variant("opt").model())
    with torch.no_grad():
        model.model.get_submodule("model.decoder.layers.1.fc2").weight[3, 4] = bad
    with pytest.raises(QuantizationError, match=r"model\.decoder\.layers\.1\.fc2 holds NaN or infinity"):
        model.quantize(None, {"group_size": 32}, samples(), max_calib_seq_len=32, progress=False)
    model = AutoQForCausalLM(variant("opt").model())
    with torch.no_grad():
        model.model.get_submodule("model.decoder.layers.1.self_attn_layer_norm").bias[3] = bad
    with pytest.raises(QuantizationError, match=r"inputs of model\.decoder\.layers\.1\.self_attn\..*NaN or infinity"):
        model.quantize(None, {"group_size": 32}, samples(), max_calib_seq_len=32, progress=False)


def test_little_data_is_a_loud_warning() -> None:
    with pytest.warns(UserWarning, match="too little calibration data.*64 channels|too little.*96 channels"):
        quantized(variant("llama-gqa"), calib=samples(1, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized(variant("llama-gqa"))


def test_samples_of_different_lengths_all_count() -> None:
    model = AutoQForCausalLM(variant("bloom").model())
    mixed = samples(5, 32) + samples(3, 20) + samples(4, 7)
    model.quantize(None, {"group_size": 32}, mixed, max_calib_seq_len=32, packing=False, progress=False)
    assert {entry.tokens for entry in model.report.quantized} == {5 * 32 + 3 * 20 + 4 * 7}


def test_quantizing_twice_is_refused() -> None:
    model = quantized(variant("llama-gqa"))
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize(None, {}, samples())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits is 5; it should be one of 2, 3, 4, 8"),
        ({"effort": "most"}, "effort is 'most'; it should be one of 'fast', 'default', 'best'"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 100}, "group_size is 100"),
        ({"group_size": 0}, "group_size is 0"),
        ({"zero_point": 1}, "zero_point is 1"),
        ({"version": "gemv"}, "'gemv' is not supported; supported are dense, gemm"),
        ({"bits": 3, "version": "gemm"}, "gemm format holds 4-bit weights only"),
        ({"group": 128}, "unknown setting 'group'"),
        ({"bits": 4, "w_bit": 3}, "'bits' twice"),
        ({"modules_to_not_convert": "lm_head"}, "should be a list"),
        ({"indivisible": "pad"}, "indivisible is 'pad'"),
    ],
)
def test_bad_settings_are_sentences_before_any_work(settings: dict[str, Any], message: str) -> None:
    model = AutoQForCausalLM(variant("llama-gqa").model())
    with pytest.raises(AutoQError, match=message):
        model.quantize(None, settings, samples(), progress=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_config_round_trip_and_legacy_names() -> None:
    assert QuantConfig.from_dict({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}) == QuantConfig(group_size=64)
    for config in (
        QuantConfig(),
        QuantConfig(bits=3, group_size=-1),
        QuantConfig(zero_point=False),
        QuantConfig(bits=8, zero_point=False, scale_activations=True),
        QuantConfig(modules_to_not_convert=("a.b",), module_group_sizes={"c.d": 32}),
    ):
        assert QuantConfig.from_checkpoint({**config.to_dict(), "written_by_others": 1}) == config
    saved = QuantConfig(zero_point=False).to_dict()
    assert (saved["quant_method"], saved["version"], saved["zero_point"]) == ("awq", "gemm", True)
    assert QuantConfig(bits=3).to_dict()["quant_method"] == "autoq"


def test_settings_beside_a_config_go_by_any_name() -> None:
    config = QuantConfig(bits=4, group_size=32)
    assert config.updated({"w_bit": 3}) == QuantConfig(bits=3, group_size=32)
    assert config.updated({"target_bits": 4.25}) == QuantConfig(group_size=32, target_bits=4.25)
    assert config.updated({"modules_to_not_convert": ["x"]}).modules_to_not_convert == ("x",)
    with pytest.raises(ConfigError, match="unknown setting 'foo'"):
        config.updated({"foo": 1})
    for name in ("target_bits", "embedding_bits"):
        with pytest.raises(ConfigError, match=f"{name} is nan"):
            QuantConfig.from_dict({name: float("nan")})


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"max_calib_seq_len": "512"}, "max_calib_seq_len is '512'"),
        ({"max_memory": 0}, "max_memory is 0; it should be"),
        ({"work_dir": ""}, "work_dir is ''; it should be a path"),
    ],
)
def test_bad_values_of_a_run_are_sentences(run: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoQError, match=message):
        AutoQForCausalLM(FAMILIES[0].model()).quantize(None, {}, samples(), progress=False, **run)


def test_a_small_b_is_for_bytes_too() -> None:
    assert byte_count(" 5 gb", "max_memory") == byte_count("5GB", "max_memory") == 5 * 10**9
    assert byte_count("16GiB ", "max_memory") == 2**34


# ---- the output head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_head_is_quantized_on_its_own_inputs(variant: Variant) -> None:
    model = quantized(variant, lm_head_bits=8, lm_head_group_size=16)
    plain = quantized(variant)
    head = model.model.lm_head
    assert isinstance(head, QuantLinear)
    assert (head.spec.bits, head.spec.group_size) == (8, 16)
    assert model.report is not None
    entry = model.report.linears[-1]
    assert entry.name == "lm_head"
    assert entry.tokens == 12 * 32
    assert entry.error_after is not None
    assert entry.error_before is not None
    assert entry.error_after < entry.error_before < 1e-4
    ids = samples()[0][None]
    with torch.no_grad():
        wanted = plain(ids).logits
        assert (model(ids).logits - wanted).norm() < 0.01 * wanted.norm()


def test_a_tied_head_is_untied_and_the_embeddings_stay(tmp_path: Path) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == "llama-tied")
    embeddings = variant.model().get_input_embeddings().weight
    model = quantized(variant, lm_head_bits=3, lm_head_group_size=32)
    assert torch.equal(model.model.get_input_embeddings().weight, embeddings)
    ids = samples()[0][None]
    with torch.no_grad():
        wanted = model(ids).logits
    model.save_quantized(tmp_path)
    again = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, wanted)
    assert again.quant_config == model.quant_config
    assert torch.equal(again.model.get_input_embeddings().weight, embeddings)


def test_the_head_takes_part_in_the_gemm_format(tmp_path: Path) -> None:
    model = quantized(FAMILIES[0], lm_head_bits=4)
    model.save_quantized(tmp_path)
    assert "quant_method" in (tmp_path / "config.json").read_text()
    ids = samples()[0][None]
    with torch.no_grad():
        wanted = model(ids).logits
        found = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu")(ids).logits
    assert torch.equal(found, wanted)
