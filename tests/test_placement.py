"""Where the parts of a model go: plans by size, maps by hand, budgets."""

from __future__ import annotations

import copy
from functools import cache
from math import inf
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from families import VARIANTS, Variant, quantized, variant
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from autoq import placement
from autoq.architectures import architecture_of
from autoq.errors import ConfigError
from autoq.placement import Device, Part, Placement, device_named, memory_budgets, parts_of, place, plan

GPUS = ("balanced", "balanced_low_0", "sequential", "auto")


def _parts(sizes: list[int], tied: dict[int, int] | None = None) -> list[Part]:
    """Parts p0, p1, ...; tied: which are tied to which, with one byte of their own, as of a bias."""
    tied = tied or {}
    return [
        Part(f"p{index}", (f"p{index}.weight",), *((1, f"p{tied[index]}") if index in tied else (size, None)))
        for index, size in enumerate(sizes)
    ]


def _used(found: Placement) -> dict[Device, int]:
    used: dict[Device, int] = {}
    for part in found.parts:
        device = found.devices[part.name]
        used[device] = used.get(device, 0) + part.size
    return used


def _in_order(found: Placement) -> list[Device]:
    return [found.devices[part.name] for part in found.parts]


# Plans -------------------------------------------------------------------------------------------------------------


def test_sequential_fills_one_device_after_the_other() -> None:
    found = plan(_parts([4, 3, 3, 3, 2]), {0: 7, 1: 6, "cpu": 100, "disk": None}, "sequential")
    assert _in_order(found) == [0, 0, 1, 1, "cpu"]


def test_balanced_loads_the_gpus_evenly() -> None:
    budgets: dict[Device, int | None] = {0: 100, 1: 100, "cpu": 100, "disk": None}
    assert _in_order(plan(_parts([2] * 6), budgets, "balanced")) == [0, 0, 0, 1, 1, 1]
    assert _in_order(plan(_parts([2] * 6), budgets, "auto")) == [0, 0, 0, 1, 1, 1]
    assert _in_order(plan(_parts([2] * 6), budgets, "sequential")) == [0] * 6
    # Within the limits: the smaller device gets what it can hold.
    assert _in_order(plan(_parts([2] * 6), {**budgets, 0: 4}, "balanced")) == [0, 0, 1, 1, 1, 1]


def test_balanced_low_0_spares_the_first() -> None:
    assert _in_order(plan(_parts([2] * 6), {0: 100, 1: 100, 2: 100}, "balanced_low_0")) == [1, 1, 1, 2, 2, 2]
    assert _in_order(plan(_parts([2] * 6), {0: 100, 1: 5, 2: 5}, "balanced_low_0")) == [0, 0, 1, 1, 2, 2]
    assert _in_order(plan(_parts([2] * 6), {0: 100}, "balanced_low_0")) == [0] * 6


def test_tied_parts_count_once_and_stay_together() -> None:
    found = plan(_parts([5, 3, 3, 5], {3: 0}), {0: 9, 1: 3, "disk": None}, "sequential")
    assert _in_order(found) == [0, 0, 1, 0]
    found = plan(_parts([5, 3, 3, 5], {3: 0}), {0: 8, 1: 6, "disk": None}, "sequential")
    assert _in_order(found) == [0, 1, 1, 0]


def test_what_no_device_holds_goes_to_the_disk_with_room_to_run_it() -> None:
    found = plan(_parts([2] * 6), {0: 4, "cpu": 6, "disk": None}, "auto")
    assert _in_order(found) == [0, 0, "cpu", "cpu", "disk", "disk"]
    assert found.runner == "cpu"
    found = plan(_parts([2] * 6), {0: 4, "cpu": 0, "disk": None}, "auto")
    assert _in_order(found) == [0, *["disk"] * 5]
    assert found.runner == 0


@pytest.mark.parametrize("budgets", [{0: 4, "cpu": 6, "disk": 3}, {0: 1, "cpu": 1, "disk": None}, {0: 8}, {}])
def test_what_cannot_fit_is_a_sentence_with_the_numbers(budgets: dict[Device, int | None]) -> None:
    mega = {device: None if size is None else size * 10**6 for device, size in budgets.items()}
    parts = _parts([2 * 10**6] * 6)
    with pytest.raises(ConfigError, match=r"take 12\.0 MB, its largest part \(p0\) 2\.0 MB.*Raise max_memory") as error:
        plan(parts, mega, "auto")
    for device, size in budgets.items():
        name = f"GPU {device}" if isinstance(device, int) else device
        assert f"{name}: {'no limit' if size is None else f'{size:.1f} MB'}" in str(error.value)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    limits=st.lists(st.integers(0, 120), min_size=0, max_size=4),
    cpu=st.integers(0, 200),
    disk=st.sampled_from([None, 0, 50]),
    strategy=st.sampled_from(GPUS),
    ties=st.booleans(),
)
def test_every_plan(sizes: list[int], limits: list[int], cpu: int, disk: int | None, strategy: str, ties: bool) -> None:
    tied = {len(sizes) - 1: 0} if ties and len(sizes) > 1 else {}
    parts = _parts(sizes, tied)
    budgets: dict[Device, int | None] = {**dict(enumerate(limits)), "cpu": cpu, "disk": disk}
    try:
        found = plan(parts, budgets, strategy)
    except ConfigError:
        # Nothing is refused that the devices hold in some way, or could run from the disk.
        assert _best_maximum(parts, [*limits, cpu]) is None
        assert disk is not None or max(_loads(parts)) > max(*limits, cpu, 0)
        return
    assert list(found.devices) == [part.name for part in parts]
    # Tied parts are together, the others in the order of the devices.
    order = list(budgets)
    untied = [order.index(found.devices[part.name]) for part in parts if part.tied_to is None]
    assert untied == sorted(untied)
    assert all(found.devices[part.name] == found.devices[part.tied_to] for part in parts if part.tied_to)
    # No budget is exceeded, and what is on the disk can be fetched.
    used = _used(found)
    for device, size in used.items():
        limit = budgets[device]
        assert limit is None or size <= limit
    if "disk" in used:
        on_disk = [part.size for part in parts if found.devices[part.name] == "disk"]
        room = budgets[found.runner]
        assert room is not None
        assert used.get(found.runner, 0) + max(on_disk) <= room
    # The slower memory is used only where the GPUs cannot hold the model.
    if strategy != "sequential" and {"cpu", "disk"}.isdisjoint(used) and strategy != "balanced_low_0":
        assert _best_maximum(parts, limits) == max(used.values())
    if _best_maximum(parts, limits) is not None:
        assert {"cpu", "disk"}.isdisjoint(used)


def _loads(parts: list[Part]) -> list[int]:
    return [
        part.size + sum(other.size for other in parts if other.tied_to == part.name)
        for part in parts
        if part.tied_to is None
    ]


def _best_maximum(parts: list[Part], limits: list[int]) -> int | None:
    """The smallest possible largest share, of contiguous shares within the limits, by trying them all."""
    loads = _loads(parts)

    @cache
    def best(start: int, device: int) -> float:
        if start == len(loads):
            return 0
        if device == len(limits):
            return inf
        shares = [(end, sum(loads[start:end])) for end in range(start, len(loads) + 1)]
        return min(max(share, best(end, device + 1)) for end, share in shares if share <= limits[device])

    found = best(0, 0)
    return None if found == inf else int(found)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=10),
    limits=st.lists(st.integers(1, 150), min_size=2, max_size=3),
)
def test_balanced_low_0_gives_the_first_no_more_than_it_must(sizes: list[int], limits: list[int]) -> None:
    parts = _parts(sizes)
    budgets: dict[Device, int | None] = dict(enumerate(limits))
    try:
        found = plan(parts, budgets, "balanced_low_0")
    except ConfigError:
        assume(False)
    first = [part for part in parts if found.devices[part.name] == 0]
    if first:  # with one part fewer on the first device, the others would not hold the rest
        rest = _parts(sizes[len(first) - 1 :])
        with pytest.raises(ConfigError):
            plan(rest, dict(enumerate(limits[1:])), "sequential")


# Parts -------------------------------------------------------------------------------------------------------------


def _empty(case: Variant) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(case.config), dtype=torch.float32)
    model.tie_weights()
    return model


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_parts_hold_every_tensor_once_and_no_block_is_split(case: Variant) -> None:
    model = quantized(case).model
    parts = parts_of(model)
    tensors = [tensor for part in parts for tensor in part.tensors]
    assert len(set(tensors)) == len(tensors)
    assert set(tensors) >= set(model.state_dict())
    names = [part.name for part in parts]
    blocks = [f"{architecture_of(case.config).blocks}.{index}" for index in range(2)]
    first = names.index(blocks[0])
    assert names[first : first + 2] == blocks
    assert any("emb" in name or "wte" in name for name in names[:first])
    assert names[-1] == "lm_head"
    # Sizes are the bytes that the tensors take, tied ones once.
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sum(part.size for part in parts) == sum(held.values())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    assert tied == model.config.tie_word_embeddings
    assert (parts[-1].tied_to is not None) == tied
    biases = sum(bias.nbytes for name, bias in head.named_parameters() if name == "bias")
    assert parts[-1].size == biases + (0 if tied else head.weight.nbytes)


def test_blocks_are_sized_by_their_quantized_bytes() -> None:
    case = variant("llama-gqa")
    full, small = parts_of(case.model()), parts_of(quantized(case).model)
    sizes = [{part.name: part.size for part in parts}["model.layers.0"] for parts in (full, small)]
    assert sizes[1] < sizes[0] / 3
    assert [part.name for part in full] == [part.name for part in small]


def test_the_meta_device_has_the_same_sizes() -> None:
    case = variant("llama-tied")
    assert parts_of(_empty(case)) == parts_of(case.model())


def test_a_chain_of_ties_has_one_root() -> None:
    model = variant("llama").model()
    model.model.embed_tokens.weight = model.lm_head.weight
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    tied = {part.name: part.tied_to for part in parts_of(model) if part.tied_to}
    assert tied == {"lm_head": "model.embed_tokens", "model.norm": "model.layers.1"}
    model.model.norm.extra = model.model.embed_tokens.weight
    tied = {part.name: part.tied_to for part in parts_of(model) if part.tied_to}
    assert set(tied.values()) <= {part.name for part in parts_of(model) if not part.tied_to}


def test_families_without_a_description_have_parts_too() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    names = [part.name for part in parts_of(model)]
    assert names == [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
        "lm_head",
    ]


# Maps and budgets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes two GPUs known by name, which is all that placing takes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    free = {0: 10**9, 1: 10**9, "cpu": 10**9}
    monkeypatch.setattr(placement, "get_max_memory", lambda: dict(free))


@pytest.mark.usefixtures("gpus")
@pytest.mark.filterwarnings("error")
def test_strategies_over_two_gpus() -> None:
    model = _empty(variant("llama"))
    whole = {part.name for part in parts_of(model)}
    assert place(model, "sequential").device_map() == {"": 0}
    for strategy in ("auto", "balanced"):
        found = place(model, strategy)
        assert set(found.device_map()) == whole
        assert found.devices["model.embed_tokens"] == found.devices["model.rotary_emb"] == 0
        assert found.devices["model.layers.1"] == found.devices["model.norm"] == found.devices["lm_head"] == 1
        assert found.by_tensor()["model.layers.1.mlp.up_proj.weight"] == 1
    assert place(model, "balanced_low_0").device_map() == {"": 1}
    assert place(model, 1).device_map() == place(model, torch.device("cuda", 1)).device_map() == {"": 1}
    assert place(model, "cuda").device_map() == {"": 0}


@pytest.mark.usefixtures("gpus")
def test_tied_heads_go_where_the_embeddings_are() -> None:
    found = place(_empty(variant("llama-tied")), "balanced", {0: "1MB", 1: "1MB"})
    assert set(found.devices.values()) == {0, 1}
    assert found.devices["lm_head"] == found.devices["model.embed_tokens"] == 0


@pytest.mark.usefixtures("gpus")
def test_what_spills_is_said() -> None:
    model = _empty(variant("llama"))
    size = sum(part.size for part in parts_of(model))
    with pytest.warns(UserWarning, match=r"of its 0\.\d MB, 0\.\d MB run on the CPU$"):
        place(model, "auto", {0: size // 2, 1: size // 4, "cpu": size})
    with pytest.warns(UserWarning, match=r"MB run on the CPU and .* are read from the disk"):
        place(model, "auto", {0: 70_000, "cpu": 290_000})


@pytest.mark.usefixtures("gpus")
def test_cuda_without_a_number_is_the_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_named("cuda") == 1
    assert device_named("cuda:0") == 0
    assert device_named(0) == 0


@pytest.mark.usefixtures("gpus")
def test_maps_by_hand() -> None:
    model = _empty(variant("llama"))
    found = place(model, {"": 1, "model.embed_tokens": "cpu", "model.layers.0": "cuda:0"})
    assert found.devices["model.embed_tokens"] == "cpu"
    assert found.devices["model.layers.0"] == 0
    assert found.devices["model.layers.1"] == found.devices["model.rotary_emb"] == found.devices["lm_head"] == 1
    # The halves of a block may have entries of their own, on one device.
    block = {
        f"model.layers.0.{name}": 0 for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    }
    assert place(model, {"": 1, **block}).devices["model.layers.0"] == 0
    # What is on the disk runs where the part before it does.
    assert place(model, {"": 0, "model.layers.1": "disk"}).runner == 0
    assert place(model, {"": 1, "model.embed_tokens": "disk"}).runner == 1
    assert place(model, {"": "disk"}).runner == "cpu"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "model.layers.0.mlp": 1}, r"splits model\.layers\.0, .* 0 for .* and 1 for model\.layers\.0\.mlp"),
        ({"": 0, "model.layers.0.self_attn.q_proj.weight": "disk"}, r"splits model\.layers\.0"),
        ({"model.layers": 0, "lm_head": 0}, r"leaves out some modules, model\.embed_tokens\.weight among them"),
        ({"": 0, "model.layers.7": 1}, r"names 'model\.layers\.7', which is no module"),
        ({"": 2}, "device_map asks for 2: "),
        ({"": -1}, "device_map asks for -1: "),
        ({"": "cuda:5"}, "device_map asks for 'cuda:5': "),
        ({"": None}, "device_map asks for None: "),
        ({"": 0, "lm_head": 1}, r"puts lm_head on 1 and model\.embed_tokens on 0, but they share"),
    ],
)
def test_maps_that_cannot_be_followed(device_map: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(_empty(variant("llama-tied")), device_map)


@pytest.mark.usefixtures("gpus")
def test_budgets_are_read_and_ordered() -> None:
    found = memory_budgets({"disk": "1GB", "cpu": "2GiB", 1: 5, "cuda:0": "3MB"})
    assert list(found.items()) == [(0, 3 * 10**6), (1, 5), ("cpu", 2 * 2**30), ("disk", 10**9)]
    assert memory_budgets({0: 7}) == {0: 7, "disk": None}
    # Of what is free, a share stays free for activations and the cache.
    assert memory_budgets(None) == {0: 9 * 10**8, 1: 9 * 10**8, "cpu": 10**9, "disk": None}


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("max_memory", "message"),
    [
        ({0: "lots"}, "max_memory is {0: 'lots'}"),
        ({0: -1}, "max_memory is {0: -1}"),
        ({0: True}, "max_memory is {0: True}"),
        ({0: 1.5}, "max_memory is"),
        ({0: None}, "max_memory is"),
        ("20GiB", "max_memory is '20GiB'"),
        ({2: "1GB"}, "max_memory names 2: .*numbers of GPUs, 'cpu' and 'disk'"),
        ({"gpu": "1GB"}, "max_memory names 'gpu': "),
        ({0: 1, "cuda:0": 2}, "max_memory names 'cuda:0' twice"),
    ],
)
def test_bad_budgets(max_memory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_budgets(max_memory)


def test_max_memory_beside_a_map_that_says_it_all() -> None:
    with pytest.warns(UserWarning, match="max_memory is not used"):
        place(_empty(variant("llama")), "cpu", {"cpu": 1})
