"""The package as its user meets it: load, quantize, save, load, generate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Variant, quantized, samples, variant
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TextStreamer,
)

from autoq import AutoQForCausalLM
from autoq.errors import ArchitectureError, AutoQError, CalibrationError, CheckpointError, ConfigError, InputError
from autoq.inputs import explained
from autoq.loading import load_quantized
from autoq.nn import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")
each_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("auto") / "llama"
    quantized(variant("llama-gqa")).save_quantized(directory)
    return directory


def _prompt(length: int = 8) -> Tensor:
    return samples(1, length, seed=3)[0][None]


def _generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    output: Tensor = model.generate(ids, **options)
    return output


@each_family
def test_the_readme_in_one_go(case: Variant, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    case.model().save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")

    model = AutoQForCausalLM.from_pretrained(tmp_path / "full")
    texts = ["Once upon a time there was a tokenizer that had no merges. " * 3] * 20
    report = model.quantize(
        tiny_tokenizer,
        quant_config={"bits": 4, "group_size": 32, "zero_point": True},
        calib_data=texts,
        max_calib_samples=16,
        max_calib_seq_len=64,
    )
    assert report.tokens == 16 * 64
    model.save_quantized(tmp_path / "out")
    tiny_tokenizer.save_pretrained(tmp_path / "out")

    loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="auto")
    inputs = tiny_tokenizer("Once upon a time", return_tensors="pt")
    output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert output.shape[1] > inputs.input_ids.shape[1]
    assert torch.equal(output, model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=2))


@each_family
def test_left_padded_batches_give_the_tokens_of_single_prompts(case: Variant) -> None:
    model = quantized(case)
    prompts = [_prompt(length)[0] for length in (3, 9, 6, 1)]
    width = max(len(prompt) for prompt in prompts)
    batch = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    together = _generate(model, batch, attention_mask=mask)[:, width:]
    for index, prompt in enumerate(prompts):
        alone = _generate(model, prompt[None], attention_mask=torch.ones(1, len(prompt)))[0, len(prompt) :]
        assert torch.equal(together[index], alone), index


def test_generation_is_that_of_transformers(llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    model = AutoQForCausalLM.from_quantized(llama, device_map="cpu")
    ids = _prompt()
    greedy = _generate(model, ids)
    assert torch.equal(_generate(model, ids, use_cache=False), greedy)
    assert torch.equal(_generate(model, ids, cache_implementation="static"), greedy)
    assert torch.equal(_generate(model, ids, assistant_model=quantized(variant("llama-gqa"), bits=3)), greedy)
    assert _generate(model, ids, num_beams=3, num_return_sequences=2).shape[0] == 2
    torch.manual_seed(0)
    sampled = _generate(model, ids, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
    torch.manual_seed(0)
    assert torch.equal(_generate(model, ids, do_sample=True, temperature=0.7, top_k=20, top_p=0.9), sampled)
    _generate(model, ids, streamer=TextStreamer(tiny_tokenizer))
    assert capsys.readouterr().out.strip()
    processed = _generate(model, ids, logits_processor=LogitsProcessorList([lambda _ids, scores: -scores]))
    assert not torch.equal(processed, greedy)
    # The cache of one turn serves the next.
    first = model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True
    )
    turn = torch.cat([first.sequences, _prompt(3)], dim=1)
    assert torch.equal(_generate(model, turn, past_key_values=first.past_key_values), _generate(model, turn))


def test_the_wrapper_passes_on_what_is_the_models(llama: Path) -> None:
    model = AutoQForCausalLM.from_quantized(llama, device_map="cpu")
    assert model.config is model.model.config
    assert model.device == torch.device("cpu")
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert model(input_ids=_prompt()).logits.shape == (1, 8, model.config.vocab_size)
    assert not model.training
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_adapters_around_a_quantized_linear_train() -> None:
    model = quantized(variant("llama-gqa"))
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    ids = _prompt()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = embeddings.weight.grad
    assert gradient is not None
    # The dequantized model has the same gradient.
    plain = quantized(variant("llama-gqa")).model
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = module.weight.float()
            plain.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], linear)
    plain.get_input_embeddings().weight.requires_grad_(True)
    plain(input_ids=ids, labels=ids).loss.backward()
    expected = plain.get_input_embeddings().weight.grad
    # weight is fp16 without a bias to tell its dtype, so the reference's weights are rounded once more.
    assert (gradient - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize(
    "device_map",
    ["cpu", torch.device("cpu"), "sequential", "balanced", "balanced_low_0", "auto", None, {"": "cpu"}],
    ids=str,
)
def test_device_maps_of_a_machine_without_gpus(llama: Path, device_map: Any) -> None:
    """Other machines are in test_spread.py."""
    loaded = AutoQForCausalLM.from_quantized(llama, device_map=device_map)
    assert loaded.hf_device_map == {"": "cpu"}
    assert torch.equal(loaded(_prompt()).logits, quantized(variant("llama-gqa"))(_prompt()).logits)


def test_max_memory_counts_quantized_bytes(llama: Path, tmp_path: Path) -> None:
    full = sum(tensor.nbytes for tensor in variant("llama-gqa").model().state_dict().values())
    model = AutoQForCausalLM.from_quantized(llama, device_map="cpu")
    small = sum(tensor.nbytes for tensor in model.model.state_dict().values())
    assert small < 0.75 * full
    # What does not hold the full-precision model holds the quantized one.
    limit = {"cpu": int(small * 1.3)}
    assert small * 1.3 < full
    fits = AutoQForCausalLM.from_quantized(llama, device_map="auto", max_memory=limit)
    assert not any(tensor.is_meta for tensor in fits.model.state_dict().values())
    limit = {"cpu": int(small * 0.6)}
    with pytest.warns(UserWarning, match="are read from the disk"):
        spilled = AutoQForCausalLM.from_quantized(llama, device_map="auto", max_memory=limit, offload_folder=tmp_path)
    assert any(tensor.is_meta for tensor in spilled.model.state_dict().values())
    assert torch.equal(spilled(_prompt()).logits, model(_prompt()).logits)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("everywhere", "device_map asks for 'everywhere'"),
        ({"model.layers.0": "cpu"}, "leaves out some modules"),
        ({"": "cpu", "model.layers.9": "disk"}, "no module of this model"),
        ({"": "cppu"}, "device_map asks for 'cppu'"),
        ("meta", "device_map asks for 'meta'"),
        (99, "device_map asks for 99"),
        (3.5, r"device_map asks for 3\.5"),
        ([], r"device_map asks for \[\]"),
    ],
)
def test_bad_device_maps(llama: Path, device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoQForCausalLM.from_quantized(llama, device_map=device_map)


@pytest.mark.parametrize("max_memory", [{"cpu": "lots"}, "1GB", {"cpu": object()}])
def test_bad_max_memory(llama: Path, max_memory: Any) -> None:
    with pytest.raises(ConfigError, match="max_memory is"):
        AutoQForCausalLM.from_quantized(llama, device_map="auto", max_memory=max_memory)


def test_wrong_kinds_of_arguments_get_a_sentence(llama: Path) -> None:
    with pytest.raises(ConfigError, match="fuse_layers is 'no'"):
        AutoQForCausalLM.from_quantized(llama, fuse_layers="no")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="tokenizer is 'gpt2'; it should be the model's tokenizer"):
        AutoQForCausalLM(variant("llama-gqa").model()).quantize("gpt2", calib_data=["text"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"device_map asks for 'disc'.* or a dict"):
        AutoQForCausalLM.from_pretrained(llama, device_map="disc")
    with pytest.raises(ConfigError, match="quant_config is 'w4'"):
        AutoQForCausalLM(variant("llama-gqa").model()).quantize(None, "w4")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["", None, 3])
def test_what_is_no_path_gets_a_sentence(bad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model_path is .* it should be a path"):
        AutoQForCausalLM.from_pretrained(bad)
    with pytest.raises(ConfigError, match=r"quant_path is .* it should be a path"):
        AutoQForCausalLM.from_quantized(bad)
    model = quantized(variant("llama-gqa"))
    with pytest.raises(ConfigError, match=r"save_dir is .* it should be a path"):
        model.save_quantized(bad)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        model.save_quantized(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_precision_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    variant("llama-gqa").model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for device_map in (None, "disk"):
        with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
            AutoQForCausalLM.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.parametrize("fuse_layers", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "gptj"])
def test_ids_that_a_model_cannot_take_get_a_sentence(name: str, fuse_layers: bool, tmp_path: Path) -> None:
    quantized(variant(name)).save_quantized(tmp_path)
    model = AutoQForCausalLM.from_quantized(tmp_path, fuse_layers=fuse_layers)
    ids, size = _prompt(), model.config.vocab_size
    for wrong in (size, -1):
        bad = ids.clone()
        bad[0, 5] = wrong
        for call in (model, lambda ids: _generate(model, ids)):
            with pytest.raises(InputError, match=rf"input_ids\[0, 5\] is {wrong}, but .* vocabulary has {size} tokens"):
                call(bad)
    with pytest.raises(InputError, match=r"input_ids is \[1, 0\]: there is no token"):
        _generate(model, ids[:, :0])
    with pytest.raises(InputError, match=r"dtype torch.float32"):
        model(ids.float())
    if name != "llama-gqa":  # whose positions go on
        with pytest.raises(InputError, match=r"context is 128 tokens, but input_ids holds 120 and 20 more are asked"):
            _generate(model, _prompt(120), max_new_tokens=20)
        cache = model(_prompt(120), use_cache=True).past_key_values
        with pytest.raises(InputError, match=r"holds 20 and 120 more are in the cache"):
            model(_prompt(20), past_key_values=cache)
    assert _generate(model, ids).shape == (1, 16)


def test_too_little_memory_is_not_the_fault_of_the_ids() -> None:
    config = variant("llama-gqa").model().config
    with pytest.raises(RuntimeError, match="memory"), explained(config, _prompt(200), lambda: 0, "asked for"):
        raise RuntimeError("not enough memory")


def test_save_pretrained_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_quantized"):
        AutoQForCausalLM.from_quantized(llama).save_pretrained(tmp_path / "out")


def test_no_code_of_a_checkpoint_is_run(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text("raise SystemExit('this code ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["_attn_implementation"] = config["attn_implementation"] = "someone/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = AutoQForCausalLM.from_quantized(llama, device_map="cpu")
    with pytest.warns(UserWarning, match="ignored.*trust_remote_code"):
        loaded = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu", trust_remote_code=True)
    assert torch.equal(loaded(_prompt()).logits, expected(_prompt()).logits)
    config["model_type"] = "evil"
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="ignored"), pytest.raises(AutoQError, match="no model could be read"):
        AutoQForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_options_of_autoawq(llama: Path) -> None:
    with pytest.warns(UserWarning, match=r"ignored.*max_seq_len"):
        AutoQForCausalLM.from_quantized(llama, device_map="cpu", max_seq_len=512)
    AutoQForCausalLM.from_quantized(llama, "", device_map="cpu")
    assert AutoQForCausalLM.from_quantized(llama, device_map="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        AutoQForCausalLM.from_quantized(llama, nonsense=1)
    with pytest.raises(ConfigError, match=r"torch_dtype is torch\.int8"):
        AutoQForCausalLM.from_quantized(llama, torch_dtype=torch.int8)


def test_from_pretrained_refuses_what_it_cannot_quantize(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        AutoQForCausalLM.from_pretrained(llama)
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(AutoQError, match="no model could be read"):
            AutoQForCausalLM.from_pretrained(place, local_files_only=True)
    config = BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, vocab_size=50)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ArchitectureError, match="'bert'"):
        AutoQForCausalLM.from_pretrained(tmp_path / "bert")


def test_from_pretrained_takes_autoawqs_options(tmp_path: Path) -> None:
    variant("llama-gqa").model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoQForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True, use_cache=False, safetensors=True)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache


def test_checkpoints_of_other_writers_load(llama: Path, tmp_path: Path) -> None:
    """Older key names, the config in a file of its own, GEMM in capitals."""
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    loaded = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu")
    expected = AutoQForCausalLM.from_quantized(llama, device_map="cpu")
    assert torch.equal(loaded(_prompt()).logits, expected(_prompt()).logits)


def test_hub_names_go_through_the_cache(llama: Path, tmp_path: Path) -> None:
    """A snapshot as huggingface_hub lays it out, links into its blob store included, loads by its name."""
    repository = tmp_path / "models--someone--tiny-awq"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for path in llama.iterdir():
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
    model = AutoQForCausalLM.from_quantized(
        "someone/tiny-awq", cache_dir=tmp_path, local_files_only=True, device_map="cpu"
    )
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_importing_fetches_nothing_and_is_quiet() -> None:
    code = "import socket; socket.socket.connect = None; import autoq; print(autoq.__all__)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""


def test_loaded_models_are_plain_to_transformers(llama: Path) -> None:
    model, config = load_quantized(
        llama, device_map="cpu", torch_dtype="auto", max_memory=None, offload_folder=None, fuse=False
    )
    assert config.bits == 4
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    assert getattr(model.config, "quantization_config", None) is None
