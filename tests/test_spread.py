"""Models whose parts are on several devices; those of `machine` stand in for GPUs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import FAMILIES, Variant, quantized, samples, variant
from machine import CPU, FIRST, SECOND, DeviceMismatch, GraphRecording, Machine
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from autoq import AutoQForCausalLM
from autoq.architectures import architecture_of
from autoq.block_ops import decoder_blocks
from autoq.errors import AutoQError, ConfigError
from autoq.nn import block as block_module
from autoq.nn import steps as recorded_steps
from autoq.nn.block import FusedForward
from autoq.nn.spread import bring, connect, disconnect, is_offloaded, remove_hooks
from autoq.placement import parts_of
from autoq.quantization import activations, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")
each_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


_GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def _prompt(length: int = 8) -> Tensor:
    return samples(1, length, seed=3)[0][None]


def _generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    output: Tensor = model.generate(ids, **{**_GREEDY, **options})
    return output


def _assert_same_files(one: Path, other: Path) -> None:
    saved, again = (
        {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for directory in (one, other)
    )
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == again[name].dtype, name
        assert torch.equal(tensor, again[name]), name


def _blocks(model: Any) -> nn.ModuleList:
    return architecture_of(model.config).decoder_blocks(model)


def _names(model: Any) -> list[str]:
    return [part.name for part in parts_of(model)]


# Several GPUs ---------------------------------------------------------------------------------------------------------


def _spread(model: Any, devices: Sequence[torch.device]) -> None:
    """Puts the blocks on these devices in turn; what is before them goes to the first, what is behind them to the last,
    but for a tied head."""
    names, blocks = _names(model), list(_blocks(model))
    first = next(index for index, name in enumerate(names) if model.get_submodule(name) is blocks[0])
    connect(model, names)
    for index, name in enumerate(names):
        tied = name == "lm_head" and model.config.tie_word_embeddings
        device = devices[0 if tied else min(max(index - first, 0), len(devices) - 1)]
        model.get_submodule(name).to(device)
    model.tie_weights()


SOME = (*FAMILIES, variant("llama-tied"), variant("opt-plain-norm"))


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
@pytest.mark.parametrize("devices", [(FIRST, SECOND), (CPU, FIRST), (FIRST, CPU)], ids=str)
def test_blocks_on_several_devices_give_the_same_tokens(case: Variant, devices: Sequence[torch.device]) -> None:
    model = quantized(case).model
    ids = torch.cat([_prompt(), _prompt().flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = _generate(model, ids, attention_mask=mask)
    with Machine():
        _spread(model, devices)
        there = [tensor.to(devices[0]) for tensor in (ids, mask)]
        found = model.generate(there[0], attention_mask=there[1], **_GREEDY, return_dict_in_generate=True)
        assert torch.equal(found.sequences.cpu(), expected)
        # The cache of a block is where the block is. MPT has none to show.
        layers = () if found.past_key_values is None else found.past_key_values.layers
        for layer, device in zip(layers, devices, strict=bool(layers)):
            assert layer.keys.device == layer.values.device == device
        assert _generate(model, there[0][:1], num_beams=3, max_new_tokens=3).device == devices[0]


def test_without_the_hooks_devices_meet() -> None:
    """That the test above can fail."""
    model = quantized(variant("llama")).model
    with Machine(), torch.no_grad():
        _spread(model, (FIRST, SECOND))
        disconnect(model)
        with pytest.raises(DeviceMismatch):
            model(_prompt().to(FIRST))


@each_family
def test_hidden_states_move_once_at_a_boundary_and_nothing_moves_twice(case: Variant) -> None:
    model = quantized(case).model
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 0] = 0
    with Machine() as machine, torch.no_grad():
        _spread(model, (FIRST, SECOND))
        inputs = _prompt().expand(2, -1).to(FIRST), mask.to(FIRST)
        del machine.moves[:]
        model(inputs[0], attention_mask=inputs[1], use_cache=False)
    hidden, logits = (2, 8, model.config.hidden_size), (2, 8, model.config.vocab_size)
    there = [shape for shape, device in machine.moves if device == SECOND]
    back = [shape for shape, device in machine.moves if device == FIRST]
    assert there.count(hidden) == 1
    assert len(there) <= 5  # the hidden states, and at most mask, cosines, sines, alibi, positions
    # With a tied head, the hidden states go back to it; without one, the logits go back.
    assert back == [hidden if model.config.tie_word_embeddings else logits]


def test_what_all_blocks_get_moves_once_to_a_device() -> None:
    """However many blocks are there; hidden states move only at boundaries."""
    deep = Variant("deep", copy.deepcopy(variant("llama").config))
    deep.config.num_hidden_layers = 6
    counts = {}
    for devices in ((FIRST, SECOND), (FIRST, *[SECOND] * 5), (FIRST, SECOND, SECOND, FIRST, SECOND, SECOND)):
        model = quantized(deep).model
        with Machine() as machine, torch.no_grad():
            _spread(model, devices)
            ids = _prompt().expand(2, -1).to(FIRST)
            del machine.moves[:]
            model(ids, use_cache=False)
        hidden = [shape for shape, _ in machine.moves if shape == (2, 8, 64)]
        counts[devices] = (len(hidden), len(machine.moves))
    # The hidden states, the cosines, the sines, the positions, and the logits on the way back.
    assert list(counts.values()) == [(1, 5), (1, 5), (3, 7)]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("llama-gqa", "auto"), ("llama-gqa", "sequential"), ("llama-tied", "balanced"), ("opt", "auto"), ("gptj", "auto")],
)
def test_from_quantized_over_two_gpus(name: str, strategy: str, tmp_path: Path) -> None:
    model = quantized(variant(name))
    model.save_quantized(tmp_path / "out")
    expected, parts = _generate(model, _prompt()), parts_of(model.model)
    size = sum(part.size for part in parts)
    limits = {"gpu:0": size * 2 // 3, "gpu:1": size * 2 // 3}
    with Machine() as machine:
        loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map=strategy, max_memory=limits)
        placed = {part.name: loaded.hf_device_map[part.name] for part in parts}
        assert set(placed.values()) == {"gpu:0", "gpu:1"}
        for part in parts:
            module = loaded.model.get_submodule(part.name)
            for tensor in (*module.parameters(), *module.buffers()):
                assert tensor.device == torch.device(placed[part.name]), part.name
        held = {id(tensor): tensor for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}.values()
        # Every tensor went straight to its device. (Models are built on the meta device.)
        moves = [device for _, device in machine.moves if device.type != "meta"]
        assert set(moves) == {FIRST, SECOND}
        assert len(moves) == len(held)
        for device in (FIRST, SECOND):
            assert sum(tensor.nbytes for tensor in held if tensor.device == device) <= limits[str(device)]
        assert torch.equal(_generate(loaded, _prompt()).cpu(), expected)
        loaded.save_quantized(tmp_path / "again")
        # Together on one of them, and back on the CPU.
        assert loaded.to(SECOND).hf_device_map == {"": "gpu:1"}
        del machine.moves[:]
        assert torch.equal(_generate(loaded, _prompt()).cpu(), expected)
        assert not [shape for shape, _ in machine.moves if shape[-1:] == (64,)]
        assert loaded.cpu().hf_device_map == {"": "cpu"}
    assert torch.equal(_generate(loaded, _prompt()), expected)
    _assert_same_files(tmp_path / "out", tmp_path / "again")


@pytest.mark.filterwarnings("ignore:the memory allowed does not hold")
def test_what_the_gpus_do_not_hold_runs_on_the_cpu_and_from_the_disk(tmp_path: Path) -> None:
    case = Variant("deep", copy.deepcopy(variant("llama-gqa").config))
    case.config.num_hidden_layers = 6
    model = quantized(case)
    model.save_quantized(tmp_path / "out")
    expected, parts = _generate(model, _prompt()), parts_of(model.model)
    size, largest = sum(part.size for part in parts), max(part.size for part in parts)
    with Machine():
        limits = {"gpu:0": size // 3, "cpu": size // 3 + largest}
        loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map="auto", max_memory=limits)
        assert list(dict.fromkeys(loaded.hf_device_map.values())) == ["gpu:0", "cpu", "disk"]
        # Blocks on the CPU are fused as ever.
        for block, name in zip(_blocks(loaded.model), (f"model.layers.{index}" for index in range(6)), strict=True):
            assert ("forward" in block.__dict__) == (loaded.hf_device_map[name] == "cpu")
        assert torch.equal(_generate(loaded, _prompt()).cpu(), expected)
        loaded.save_quantized(tmp_path / "again")
        # What is on the disk runs on a GPU where there is nothing else.
        loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", max_memory={"gpu:1": size // 2})
        assert torch.equal(_generate(loaded, _prompt()).cpu(), expected)
    _assert_same_files(tmp_path / "out", tmp_path / "again")


# The hooks ------------------------------------------------------------------------------------------------------------


def test_a_tensor_that_was_written_to_moves_again() -> None:
    """The positions of a decode loop may be one tensor that is counted up."""
    seen = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device="meta"))

        def forward(self, x: Tensor, *, at: Tensor) -> Tensor:
            seen.append(at)
            return x

    class Model(nn.Module):
        _skip_keys_device_placement = None

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor, at: Tensor) -> None:
            for block in self.blocks:
                block(x, at=at)

    model: Any = Model()
    connect(model, ["blocks.0", "blocks.1"])
    at = torch.zeros(1)
    model(torch.zeros(1), at)
    assert seen[0] is seen[1]
    assert seen[0].is_meta
    at += 1
    model(torch.zeros(1), at)
    assert seen[2] is seen[3]
    assert seen[2] is not seen[0]
    with torch.inference_mode():  # where nothing tells whether a tensor was written to
        at = torch.zeros(1)
        model(torch.zeros(1), at)
    assert seen[4] is not seen[5]
    # Copies do not outlive what they were made of.
    hook = next(iter(model.blocks[0]._forward_pre_hooks.values()))
    del at, seen[:]
    assert not len(hook._copies)


def test_gradients_cross_boundaries() -> None:
    model = quantized(variant("llama-gqa")).model
    ids = _prompt()
    embeddings = model.get_input_embeddings().weight
    gradients = []
    for _ in range(2):
        embeddings.requires_grad_(True).grad = None
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(embeddings.grad)
        connect(model, _names(model))
    assert torch.equal(*gradients)


def test_connected_models_are_copied_pickled_and_moved() -> None:
    model = quantized(variant("llama-gqa")).model
    expected = model(_prompt()).logits
    connect(model, _names(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(buffer, weights_only=False), model.to("cpu")):
        assert torch.equal(other(_prompt()).logits, expected)
        assert sum(len(module._forward_pre_hooks) for module in other.modules()) == len(parts_of(other))
    disconnect(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@each_family
def test_connected_blocks_stay_fused(case: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(case).model
    del model.forward  # which records steps
    expected = _generate(model, _prompt())
    connect(model, _names(model))
    calls = []
    monkeypatch.setattr(block_module, "decoder_blocks", lambda *args: calls.append(1) or decoder_blocks(*args))
    assert torch.equal(_generate(model, _prompt()), expected)
    assert len(calls) == 2 * 5


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_steps_are_recorded_with_graphs_of_each_device(case: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_module, "runs_on", lambda device: True)
    monkeypatch.setitem(recorded_steps.RECORDERS, "gpu", GraphRecording)
    model = quantized(case).model
    ids = torch.cat([_prompt(), _prompt().flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = _generate(model, ids, attention_mask=mask, use_cache=True)
    with Machine():
        _spread(model, (FIRST, SECOND))
        model.forward.forget()  # what was recorded on the CPU
        for _ in range(2):  # the second time, with the recording of the first
            found = _generate(model, ids.to(FIRST), attention_mask=mask.to(FIRST), use_cache=True)
            assert torch.equal(found.cpu(), expected)
        (slot,) = model.forward._slots
        (step,) = slot.recordings.values()
        graphs = [graph for graph, _ in step.recording._stretches]
        back = [FIRST] if model.config.tie_word_embeddings else []
        assert [graph.device for graph in graphs] == [FIRST, SECOND, *back]
        assert all(graph.replays == 2 * 4 for graph in graphs)


# Offload ------------------------------------------------------------------------------------------------------------


@each_family
def test_offloaded_models_generate_and_save_the_same(case: Variant, tmp_path: Path) -> None:
    model = quantized(case)
    model.save_quantized(tmp_path / "out")
    blocks = architecture_of(case.config).blocks
    for number, device_map in enumerate(({"": "cpu", f"{blocks}.1": "disk"}, {"": "disk"})):
        loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map=device_map)
        assert loaded.hf_device_map[f"{blocks}.1" if number == 0 else ""] == "disk"
        # Blocks in memory are fused, those whose weights come and go are not.
        fused = [isinstance(block.__dict__.get("forward"), FusedForward) for block in _blocks(loaded.model)]
        assert fused == [number == 0, False]
        assert torch.equal(_generate(loaded, _prompt()), _generate(model, _prompt()))
        # In shards, so that tensors are fetched one after the other.
        loaded.save_quantized(tmp_path / f"again-{number}", shard_size="30KB")
        _assert_same_files(tmp_path / "out", tmp_path / f"again-{number}")
        assert all(tensor.is_meta for tensor in loaded.model.get_submodule(f"{blocks}.1").state_dict().values())


def test_a_tied_head_on_the_disk(tmp_path: Path) -> None:
    model = quantized(variant("llama-tied"))
    model.save_quantized(tmp_path / "out")
    device_map = {"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"}
    loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", device_map=device_map)
    assert torch.equal(_generate(loaded, _prompt()), _generate(model, _prompt()))
    loaded.save_quantized(tmp_path / "again")
    _assert_same_files(tmp_path / "out", tmp_path / "again")


def test_budgets_spill_to_the_disk_and_say_so(tmp_path: Path) -> None:
    model = quantized(variant("llama-gqa"))
    model.save_quantized(tmp_path / "out")
    parts = parts_of(model.model)
    size, largest = sum(part.size for part in parts), max(part.size for part in parts)
    with pytest.warns(UserWarning, match="are read from the disk"):
        loaded = AutoQForCausalLM.from_quantized(tmp_path / "out", max_memory={"cpu": size - 1})
    held = sum(tensor.nbytes for tensor in (*loaded.model.parameters(), *loaded.model.buffers()) if not tensor.is_meta)
    assert held <= size - 1 - largest
    assert torch.equal(_generate(loaded, _prompt()), _generate(model, _prompt()))
    with pytest.raises(ConfigError, match=r"does not fit: its weights take .* MB"):
        AutoQForCausalLM.from_quantized(tmp_path / "out", max_memory={"cpu": size - 1, "disk": 0})


# Moving -------------------------------------------------------------------------------------------------------------


def test_moving_works_or_says_why_not(tmp_path: Path) -> None:
    quantized(variant("llama-gqa")).save_quantized(tmp_path)
    loaded = AutoQForCausalLM.from_quantized(tmp_path, device_map={"": "cpu", "model.layers.1": "disk"})
    assert is_offloaded(loaded.model)
    for move in (lambda: loaded.to("cpu"), loaded.cpu, loaded.cuda, loaded.half, lambda: loaded.to(torch.bfloat16)):
        with pytest.raises(AutoQError, match="offloaded, so it can be neither moved nor cast"):
            move()
    whole = AutoQForCausalLM.from_quantized(tmp_path, device_map="cpu")
    expected = whole(_prompt()).logits
    assert torch.equal(whole.to("cpu").cpu()(_prompt()).logits, expected)
    assert whole.hf_device_map == {"": "cpu"}


def test_a_model_brought_to_one_device_moves_nothing_any_more() -> None:
    model = quantized(variant("llama-gqa"))
    connect(model.model, _names(model.model))
    model.model.hf_device_map = {"model": 0, "lm_head": 1}
    model.to("cpu")
    assert model.hf_device_map == {"": "cpu"}
    assert not any(module._forward_pre_hooks for module in model.modules())


# Quantizing -----------------------------------------------------------------------------------------------------------


def _tensors(model: AutoQForCausalLM) -> dict[str, Tensor]:
    return dict(model.model.state_dict())


def _assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same but for rounding: off the CPU torch computes some products otherwise."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ((found[name] - tensor).abs() <= 1e-5 * tensor.abs()).double().mean() > 0.99, name


@pytest.mark.parametrize("device", ["cpu", ["cpu"], ["cpu", "cpu"], ["cpu", torch.device("cpu"), "cpu"]], ids=str)
def test_the_search_on_other_devices_finds_the_same(device: Any) -> None:
    """Also several blocks at a time."""
    case = Variant("deep", copy.deepcopy(variant("llama-gqa").config))
    case.config.num_hidden_layers = 5
    expected = quantized(case)
    found = AutoQForCausalLM(case.model())
    report = found.quantize(
        None, {"bits": 4, "group_size": 32}, samples(), max_calib_seq_len=32, progress=False, device=device
    )
    assert [entry.name for entry in report.linears] == [entry.name for entry in expected.report.linears]
    assert all(torch.equal(tensor, _tensors(found)[name]) for name, tensor in _tensors(expected).items())


def test_a_bad_weight_is_named_from_every_thread() -> None:
    model = variant("llama-gqa").model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(AutoQError, match=r"model\.layers\.0"):
        AutoQForCausalLM(model).quantize(None, {}, samples(), progress=False, device=["cpu", "cpu"])


@pytest.mark.parametrize("device", ["disk", "meta", "cuda:7", [], ["cpu", "nowhere"], 3.5])
def test_bad_devices_are_sentences_before_any_work(device: Any) -> None:
    model = AutoQForCausalLM(variant("llama-gqa").model())
    with pytest.raises(ConfigError, match="device is"):
        model.quantize(None, {}, samples(), progress=False, device=device)
    model(_prompt())


@pytest.mark.parametrize("device", [None, FIRST, [FIRST, SECOND]], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "opt-plain-norm", "falcon-multi-query"])
def test_models_spread_over_devices_are_quantized(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = variant(name)

    def there(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Machine():  # every thread has its own
                return function(*args)

        return run

    for step in ("check_statistics", "quantize_block"):
        monkeypatch.setattr(pipeline, step, there(getattr(pipeline, step)))
    settings = {"bits": 4, "group_size": 32, "lm_head_bits": 8, "embedding_bits": 4, "effort": "fast"}
    expected = quantized(case, **settings)
    model = AutoQForCausalLM(case.model())
    with Machine():
        _spread(model.model, (FIRST, SECOND))
        before = {name: tensor.device for name, tensor in model.model.named_parameters()}
        run = {"max_calib_seq_len": 32, "progress": False, "device": device, "eval_data": samples(3)}
        report = model.quantize(None, settings, samples(), **run)
        assert report.held_out.kl_divergence < 0.1
        for block, place in zip(_blocks(model.model), (FIRST, SECOND), strict=True):
            assert {tensor.device for tensor in (*block.parameters(), *block.buffers())} == {place}
        assert all(tensor.device == before[name] for name, tensor in model.model.named_parameters())
        found = {name: tensor.cpu() for name, tensor in _tensors(model).items()}
        # A head and embeddings that were replaced still get what other devices give, and run.
        logits, wanted = model.model(_prompt()).logits, expected(_prompt()).logits
        assert (logits - wanted).norm() < 0.05 * wanted.norm()
    _assert_near(found, _tensors(expected))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_model_on_the_cpu_is_searched_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = variant(name)
    settings = {"bits": 4, "group_size": 32, "lm_head_bits": 8, "embedding_bits": 4, "effort": "fast"}
    expected = quantized(case, **settings)
    model = AutoQForCausalLM(case.model())
    resting = set()
    write = activations.HiddenStates.write

    def note(self: activations.HiddenStates, batch: int, states: Tensor) -> None:
        resting.add(states.device)
        write(self, batch, states)

    monkeypatch.setattr(activations.HiddenStates, "write", note)
    with Machine() as machine:
        model.quantize(None, settings, samples(), max_calib_seq_len=32, progress=False, device=SECOND)
        assert {device for _, device in machine.moves} == {CPU, SECOND}
    assert resting == {CPU}  # a GPU holds no more than a block
    assert {tensor.device for tensor in _tensors(model).values()} == {CPU}
    _assert_near(_tensors(model), _tensors(expected))


def test_only_accelerates_hooks_are_removed() -> None:
    linear = nn.Linear(4, 4)
    twice = lambda inputs: 2 * nn.functional.linear(inputs, linear.weight, linear.bias)  # noqa: E731
    linear.forward = twice
    add_hook_to_module(linear, AlignDevicesHook(torch.device("cpu")))
    remove_hooks(linear)
    assert linear.forward is twice
    plain = nn.Linear(4, 4)
    add_hook_to_module(plain, AlignDevicesHook(torch.device("cpu")))
    remove_hooks(plain)
    assert "forward" not in plain.__dict__


def test_a_head_that_runs_on_a_gpu_and_rests_on_the_disk_is_quantized(tmp_path: Path) -> None:
    case = variant("llama")
    case.model().save_pretrained(tmp_path)
    model = AutoQForCausalLM.from_pretrained(tmp_path, device_map="disk").model
    with Machine():
        for name, module in model.named_modules():
            if hasattr(module, "_hf_hook") and name != "lm_head":
                bring(module, name)
        bring(model.model, "model")
        model.model.to(FIRST)
        model.lm_head._hf_hook.execution_device = FIRST
        settings = {"group_size": 32, "lm_head_bits": 8, "effort": "fast"}
        report = AutoQForCausalLM(model).quantize(
            None, settings, samples(), max_calib_seq_len=32, progress=False, eval_data=samples(3)
        )
        assert {tensor.device for tensor in model.lm_head.buffers()} == {FIRST}
        assert report.held_out.kl_divergence < 0.1
        model(_prompt().to(FIRST))


def test_hooks_of_accelerate_give_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model over several devices, as transformers loads it."""
    variant("llama").model().save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        model, found = load(*args, **{**kwargs, "device_map": None})
        for part in _names(model):
            for module in model.get_submodule(part).modules():
                add_hook_to_module(module, AlignDevicesHook("cpu"))
        model.hf_device_map = dict(zip(_names(model), [0, 0, 0, 1, 1, 1], strict=True))
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", dispatched)
    model = AutoQForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert all(len(model.model.get_submodule(part)._forward_pre_hooks) == 1 for part in _names(model.model))


def test_what_is_on_the_disk_is_fetched_to_be_quantized(tmp_path: Path) -> None:
    case = variant("llama")
    case.model().save_pretrained(tmp_path)
    parts = dict.fromkeys(_names(case.model()), "cpu")
    model = AutoQForCausalLM.from_pretrained(
        tmp_path, device_map={**parts, "model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    )
    model.quantize(None, {"group_size": 32}, samples(), max_calib_seq_len=32, progress=False)
    expected = quantized(case)
    assert torch.equal(model(_prompt()).logits, expected(_prompt()).logits)
    assert all(parameter.is_meta for parameter in model.model.model.layers[1].parameters())
