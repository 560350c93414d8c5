"""Checkpoints on disk: saved whole or not at all, and read without trust."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Variant, quantized, samples, variant
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoq import AutoQForCausalLM, checkpoint
from autoq.checkpoint import write_checkpoint
from autoq.errors import AutoQError, CheckpointError
from autoq.nn import QuantLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:too little calibration data"),
    pytest.mark.filterwarnings("ignore:the group size .* does not divide"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded 4-bit checkpoint of a small Llama. Tests that change it work on a copy."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    quantized(variant("llama-gqa")).save_quantized(directory, shard_size="40KB")
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for path in saved.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.stack(samples(2, 16, seed=5))).logits
    return logits


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def _edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites a sharded checkpoint as a single file with its tensors changed."""
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (directory / "model.safetensors.index.json").unlink()
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_round_trip_of_every_variant(case: Variant, tmp_path: Path) -> None:
    model = quantized(case)
    model.save_quantized(tmp_path / "out")
    loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="cpu")
    assert torch.equal(_logits(loaded), _logits(model))
    assert loaded.quant_config == model.quant_config


@pytest.mark.parametrize("settings", [
    {"bits": 2}, {"bits": 3, "zero_point": False}, {"bits": 8}, {"zero_point": False}, {"group_size": -1},
    {"group_size": 64}, {"version": "dense"}, {"scale_activations": True}, {"modules_to_not_convert": ["layers.0."]},
])  # fmt: skip
def test_round_trip_of_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    for case in (variant("llama-gqa"), variant("opt-gelu")):
        out = tmp_path / case.name
        model = quantized(case, **settings)
        model.save_quantized(out)
        loaded = AutoQForCausalLM.from_quantized(out, device_map="cpu")
        assert torch.equal(_logits(loaded), _logits(model))
        assert loaded.quant_config == model.quant_config
        # What was loaded saves as the very same files.
        loaded.save_quantized(tmp_path / f"{case.name}-again")
        first, second = (load_file(path / "model.safetensors") for path in (out, tmp_path / f"{case.name}-again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_dense_costs_the_bits_it_says(tmp_path: Path) -> None:
    sizes = {}
    for bits in (2, 3, 4, 8):
        quantized(variant("llama-gqa"), bits=bits, group_size=-1, version="dense").save_quantized(tmp_path / str(bits))
        tensors = load_file(tmp_path / str(bits) / "model.safetensors")
        sizes[bits] = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("qweight"))
    assert sizes[2] * 3 == sizes[3] * 2
    assert sizes[2] * 2 == sizes[4]
    assert sizes[2] * 4 == sizes[8]


def test_config_json_serves_every_reader(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    quantization = config["quantization_config"]
    assert {key: quantization[key] for key in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    assert quantization["modules_to_not_convert"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((saved / "generation_config.json").read_text())
    report = json.loads((saved / "quantization_report.json").read_text())
    assert len(report["linears"]) == 14
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in saved.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = quantized(variant("llama-tied"))
    model.save_quantized(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_loading_holds_one_copy_of_the_codes(saved: Path) -> None:
    model = AutoQForCausalLM.from_quantized(saved, device_map="cpu")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert not list(module.parameters())
            assert {name for name, _ in module.named_buffers()} == {"codes", "scales", "zeros"}
            assert module.codes.numel() * 4 <= (module.out_features + 15) // 16 * 16 * (module.in_features + 31) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_is_that_of_the_activations_and_leaves_the_scales(saved: Path, dtype: Any) -> None:
    model = AutoQForCausalLM.from_quantized(saved, device_map="cpu", torch_dtype=dtype)
    assert model.dtype == (torch.bfloat16 if isinstance(dtype, str) else dtype)
    scales = {module.scales.dtype for module in model.modules() if isinstance(module, QuantLinear)}
    assert scales == {torch.float16}
    assert torch.isfinite(_logits(model)).all()


def test_casting_a_model_keeps_its_weights(saved: Path) -> None:
    model = AutoQForCausalLM.from_quantized(saved, device_map="cpu")
    before = {name: module.scales.clone() for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    model.to(torch.bfloat16)
    model.to(torch.float32)
    for name, scales in before.items():
        assert torch.equal(model.get_submodule(name).scales, scales)


# --- damaged and hostile checkpoints -------------------------------------------------------------------------------


def _truncate(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[0].write_bytes(b"\xff" * 500)


def _empty_file(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[0].write_bytes(b"")


def _remove_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[0].unlink()


def _rename_in(directory: Path, old: str, new: str) -> None:
    _edit_tensors(directory, lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def _replace_in(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    _edit_tensors(directory, lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous()))


def _index(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    _edit_json(directory / "model.safetensors.index.json", edit)


def _place(directory: Path, file: Any) -> None:
    """Lets the index place a tensor x in a file (None: in the first shard)."""
    _index(directory, lambda index: index["weight_map"].update(x=file or min(index["weight_map"].values())))


def _config(directory: Path, **changes: Any) -> None:
    _edit_json(directory / "config.json", lambda config: config.update(changes))


def _quant(directory: Path, **changes: Any) -> None:
    _edit_json(directory / "config.json", lambda config: config["quantization_config"].update(changes))


def _only_pickle(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Explosive()))


class _Explosive:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("this-directory-must-not-appear",))


Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (_truncate, "truncated or damaged"),
    "garbage shard": (_garbage, "truncated or damaged"),
    "empty shard": (_empty_file, "truncated or damaged"),
    "missing shard": (_remove_shard, "is missing; the checkpoint is incomplete"),
    "pickle only": (_only_pickle, "a pickle, which can run code"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("*.safetensors*")], "not a complete checkpoint"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "not an object"),
    "config binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "not quantized": (lambda d: _config(d, quantization_config=None), "not quantized"),
    "other method": (lambda d: _quant(d, quant_method="gptq"), "quantized with 'gptq'"),
    "quantization a string": (lambda d: _config(d, quantization_config="awq"), "should be a dict"),
    "bits": (lambda d: _quant(d, bits=7), "bits is 7"),
    "version": (lambda d: _quant(d, version="marlin"), "'marlin' is not supported"),
    "version mistyped": (lambda d: _quant(d, version=["gemm"]), "version"),
    "group size": (lambda d: _quant(d, group_size=64), "asks for"),
    "group size mistyped": (lambda d: _quant(d, group_size="128"), "group_size is '128'"),
    "wrong bits for the tensors": (lambda d: _quant(d, bits=8, version="dense"), "asks for"),
    "unknown model type": (lambda d: _config(d, model_type="nonesuch"), "no model transformers knows"),
    "fewer layers": (lambda d: _config(d, num_hidden_layers=1), "does not have"),
    "tied by the config alone": (lambda d: _config(d, tie_word_embeddings=True), "two tensors that differ"),
    "size mistyped": (lambda d: _config(d, vocab_size="many"), "config"),
    "heads that do not divide": (lambda d: _config(d, num_attention_heads=3, head_dim=None), "config|asks for"),
    "unknown activation": (lambda d: _config(d, hidden_act="evil"), "config"),
    "generation config": (
        lambda d: _edit_json(d / "generation_config.json", lambda g: g.update(cache_implementation="evil")),
        "not a generation config",
    ),
    "unknown tensor": (
        lambda d: _edit_tensors(d, lambda t: t.__setitem__("model.layers.0.mlp.act_fn.scales", torch.ones(96))),
        "holds 1 tensor that .* does not have, .*act_fn.scales",
    ),
    "negative size": (lambda d: _config(d, hidden_size=-4), "config"),
    "other width": (lambda d: _config(d, intermediate_size=128), "asks for"),
    "other vocabulary": (lambda d: _config(d, vocab_size=999), "asks for"),
    "more layers": (lambda d: _config(d, num_hidden_layers=3), "has no tensor model.layers.2"),
    "index path up": (lambda d: _place(d, "../evil.safetensors"), "same directory"),
    "index path absolute": (lambda d: _place(d, "/etc/x.safetensors"), "same dir"),
    "index path windows": (lambda d: _place(d, "..\\e.safetensors"), "same dir"),
    "index to a pickle": (lambda d: _place(d, "x.bin"), "same directory"),
    "index mistyped": (lambda d: _place(d, 3), "same directory"),
    "index empty": (lambda d: _index(d, lambda i: i.update(weight_map={})), "no weight_map"),
    "index names absent": (lambda d: _place(d, None), "lacks the tensor x"),
    "renamed codes": (lambda d: _rename_in(d, f"{Q}.qweight", f"{Q}.weights"), "has no tensor .*q_proj.qweight"),
    "renamed norm": (lambda d: _rename_in(d, "model.norm.weight", "model.norm.scale"), "no tensor model.norm.weight"),
    "missing zeros": (lambda d: _edit_tensors(d, lambda t: t.pop(f"{Q}.qzeros")), "has no tensor .*q_proj.qzeros"),
    "codes of other dtype": (lambda d: _replace_in(d, f"{Q}.qweight", lambda t: t.long()), "asks for torch.int32"),
    "codes of other shape": (lambda d: _replace_in(d, f"{Q}.qweight", lambda t: t[:-1]), "asks for"),
    "codes transposed": (lambda d: _replace_in(d, f"{Q}.qweight", lambda t: t.T), "asks for"),
    "scales of other shape": (lambda d: _replace_in(d, f"{Q}.scales", lambda t: t[:, :-8]), "asks for"),
    "scales of integers": (lambda d: _replace_in(d, f"{Q}.scales", lambda t: t.int()), "asks for"),
    "scales not finite": (lambda d: _replace_in(d, f"{Q}.scales", lambda t: t * torch.nan), "NaN or infinity"),
    "norm of integers": (lambda d: _replace_in(d, "model.norm.weight", lambda t: t.int()), "asks for"),
    "norm of other shape": (lambda d: _replace_in(d, "model.norm.weight", lambda t: t[None]), "asks for"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_gives_a_sentence_and_runs_nothing(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(AutoQError, match=message) as caught:
        AutoQForCausalLM.from_quantized(copy, device_map="cpu")
    assert len(str(caught.value)) > 40
    assert not (tmp_path / "this-directory-must-not-appear").exists()


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        AutoQForCausalLM.from_quantized(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        AutoQForCausalLM.from_quantized(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a directory nor a hub repository"):
        AutoQForCausalLM.from_quantized(tmp_path / "nothing", local_files_only=True)


def test_scaled_activations_of_the_wrong_shape(tmp_path: Path) -> None:
    quantized(variant("gptj"), scale_activations=True).save_quantized(tmp_path / "out", shard_size="40KB")
    name = "transformer.h.0.mlp.act.scales"
    _replace_in(tmp_path / "out", name, lambda t: t[:-1])
    with pytest.raises(CheckpointError, match=f"{name} is .*asks for"):
        AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="cpu")


def test_extra_tensors_of_older_transformers_are_no_problem(copy: Path) -> None:
    _edit_tensors(
        copy, lambda tensors: tensors.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    )
    AutoQForCausalLM.from_quantized(copy, device_map="cpu")


# --- saving --------------------------------------------------------------------------------------------------------


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(saved: Path, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    (copy / "README.md").write_text("mine")
    model = quantized(variant("llama-gqa"), bits=3)
    model.save_quantized(copy)
    assert (copy / "tokenizer.json").exists()
    assert (copy / "README.md").read_text() == "mine"
    assert [path.name for path in copy.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(_logits(AutoQForCausalLM.from_quantized(copy, device_map="cpu")), _logits(model))
    assert not list(copy.parent.glob(".*"))


def test_a_save_that_fails_leaves_the_old_checkpoint(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def tensors() -> Any:
        yield "a", torch.zeros(3)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(copy, tensors(), {"config.json": "{}"}, 10**9)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert not list(copy.parent.glob(".*"))


def test_files_of_others_stay(copy: Path) -> None:
    (copy / "adapter_model.safetensors").write_bytes(b"mine")
    quantized(variant("llama-gqa"), bits=3).save_quantized(copy)
    assert (copy / "adapter_model.safetensors").read_bytes() == b"mine"
    assert "Quantized to 3 bits" in (copy / "README.md").read_text()


def test_a_full_precision_model_is_not_overwritten(tmp_path: Path) -> None:
    variant("llama-gqa").model().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="not quantized; save the quantized one somewhere else"):
        quantized(variant("llama-gqa")).save_quantized(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("function", ["replace", "unlink", "fsync"])
def test_a_save_that_fails_at_any_step_leaves_one_checkpoint_or_none(
    function: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails every call of a file operation in turn: what is left loads as the old or the new model, or not at all."""
    old, new = AutoQForCausalLM.from_quantized(saved, device_map="cpu"), quantized(variant("llama-gqa"), bits=3)
    logits = [_logits(old), _logits(new)]
    original = getattr(os, function)
    refused = failing = 0
    finished = False
    while not finished:
        out = tmp_path / str(failing)
        shutil.copytree(saved, out)
        with monkeypatch.context() as patch:
            calls = iter(range(failing))

            def fail_in_turn(*args: Any, calls: Any = calls, **options: Any) -> Any:
                if next(calls, None) is None:
                    raise OSError("the machine went away")
                return original(*args, **options)

            patch.setattr(os, function, fail_in_turn)
            try:
                new.save_quantized(out)
                finished = True
            except OSError:
                failing += 1
        try:
            found = _logits(AutoQForCausalLM.from_quantized(out, device_map="cpu"))
            assert any(torch.equal(found, expected) for expected in logits)
        except CheckpointError:
            refused += 1
            assert not finished
    assert failing > 2
    assert refused > 0


def test_saving_needs_a_quantized_model_and_a_place(tmp_path: Path) -> None:
    model = AutoQForCausalLM(variant("llama-gqa").model())
    with pytest.raises(AutoQError, match="not quantized yet"):
        model.save_quantized(tmp_path / "out")
    model = quantized(variant("llama-gqa"))
    (tmp_path / "file").write_text("")
    with pytest.raises(AutoQError, match="not a directory"):
        model.save_quantized(tmp_path / "file")
    with pytest.raises(AutoQError, match="shard_size is 'big'"):
        model.save_quantized(tmp_path / "out", shard_size="big")
    with pytest.raises(AutoQError, match="safetensors only"):
        model.save_quantized(tmp_path / "out", safetensors=False)


_SAVE_FOREVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from families import quantized, variant
import torch
torch.set_num_threads(1)
models = [quantized(variant("llama-gqa")), quantized(variant("llama-gqa"), bits=3)]
print("ready", flush=True)
while True:
    for model in models:
        model.save_quantized({out!r}, shard_size="30KB")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_while_saving_nothing_half_written_loads(tmp_path: Path) -> None:
    """Kills a process that saves two different models over each other, at many moments."""
    out = tmp_path / "out"
    models = [quantized(variant("llama-gqa")), quantized(variant("llama-gqa"), bits=3)]
    expected = [_logits(model) for model in models]
    script = textwrap.dedent(_SAVE_FOREVER).format(tests=str(Path(__file__).parent), out=str(out))
    outcomes = {"complete": 0, "refused": 0}
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        # Stopped and looked at many times, killed at the end: a stopped process is as good as a dead one on disk.
        for step in range(25):
            time.sleep(0.003 + 0.0017 * (7 * step + attempt) % 0.02)
            process.send_signal(signal.SIGSTOP)
            try:
                found = _logits(AutoQForCausalLM.from_quantized(out, device_map="cpu"))
                assert any(torch.equal(found, logits) for logits in expected)
                outcomes["complete"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    assert outcomes["complete"] > 0
    # The next save cleans up after the killed ones.
    models[0].save_quantized(out)
    assert torch.equal(_logits(AutoQForCausalLM.from_quantized(out, device_map="cpu")), expected[0])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
def test_a_checkpoint_is_read_ahead_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[bytes] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, _: parts.append(os.pread(file, length, start)))
    monkeypatch.setattr(checkpoint, "_HINT", 1000)
    AutoQForCausalLM.from_quantized(saved)
    tensors = [tensor for path in saved.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sorted(b"".join(parts)) == sorted(b"".join(tensor.numpy().tobytes() for tensor in tensors))


def test_two_models_share_an_offload_folder(tmp_path: Path) -> None:
    names = ("llama", "llama-biases")
    for name in names:
        quantized(variant(name)).save_quantized(tmp_path / name)
    ids = samples()[0][None]

    def load(name: str) -> AutoQForCausalLM:
        return AutoQForCausalLM.from_quantized(tmp_path / name, device_map="disk", offload_folder=tmp_path / "folder")

    first = load(names[0])
    with torch.no_grad():
        before = first(ids).logits
        load(names[1])
        assert torch.equal(first(ids).logits, before)


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    model = quantized(variant("llama"))
    monkeypatch.setattr("autoq.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left on device.*make room"):
        model.save_quantized(tmp_path / "out")
    assert not (tmp_path / "out").exists()
