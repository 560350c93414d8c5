"""Where the parts of a model go: device maps, made from the bytes the parts really take."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.errors import ConfigError

# As accelerate and transformers write devices: a number for a GPU, "cpu", "disk", or torch's name for others.
Device = str | int
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# Of a GPU's free memory, when no limits are given; the rest is for activations and the cache.
_SHARE_FOR_WEIGHTS = 0.9


@dataclass(frozen=True)
class Part:
    """A piece of a model that is whole on one device: a decoder block, an embedding, a norm, the head.

    tensors: their names in the model. size: the bytes of these, but for those an earlier part has counted.
    tied_to: an earlier part with the same weights, which this one has to be together with.
    """

    name: str
    tensors: tuple[str, ...]
    size: int
    tied_to: str | None = None

    @property
    def is_module(self) -> bool:
        """False for a tensor that belongs to a module with several parts."""
        return self.tensors != (self.name,)


@dataclass(frozen=True)
class Placement:
    """devices: of every part, in the order the parts run; runner: where what is on the disk is fetched to and runs."""

    parts: tuple[Part, ...]
    devices: dict[str, Device]
    runner: Device = "cpu"

    def device_map(self) -> dict[str, Device]:
        """As transformers keeps it in `hf_device_map`."""
        used = set(self.devices.values())
        return {"": used.pop()} if len(used) == 1 else dict(self.devices)

    def by_tensor(self) -> dict[str, Device]:
        """The device of every tensor, by its name."""
        return {tensor: self.devices[part.name] for part in self.parts for tensor in part.tensors}

    def modules(self) -> list[str]:
        return [part.name for part in self.parts if part.is_module]


def parts_of(model: PreTrainedModel) -> tuple[Part, ...]:
    """The parts of a model in the order they run, as far as it can be told: tables that are computed (of rotary
    positions) are needed before the blocks wherever the model keeps them, the others run as they are registered.

    The model may be on the meta device; what counts is the shapes and dtypes of its tensors.
    """
    parts: list[Part] = []
    owner: dict[int, str] = {}
    computed: list[Part] = []
    for name, module in _whole_modules(model, set(model._no_split_modules or ())):
        tensors = {name: module} if isinstance(module, Tensor) else _named_tensors(name, module)
        fresh = {id(tensor): tensor.nbytes for tensor in tensors.values() if id(tensor) not in owner}
        tied_to = next((owner[id(tensor)] for tensor in tensors.values() if id(tensor) in owner), None)
        owner.update(dict.fromkeys(fresh, tied_to or name))
        part = Part(name, tuple(tensors), sum(fresh.values()), tied_to)
        weights = isinstance(module, Tensor) or len(module.state_dict()) > 0
        if tensors:
            (parts if weights else computed).append(part)
    return (*parts[:1], *computed, *parts[1:])


def _whole_modules(module: nn.Module, blocks: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The blocks, by the names of their classes, and the largest modules beside them; the tensors too that belong to
    what holds those."""
    for leaf, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        yield f"{prefix}{leaf}", tensor
    for leaf, child in module.named_children():
        if type(child).__name__ not in blocks and any(type(inner).__name__ in blocks for inner in child.modules()):
            yield from _whole_modules(child, blocks, f"{prefix}{leaf}.")
        else:
            yield f"{prefix}{leaf}", child


def _named_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    named = chain(
        module.named_parameters(name, remove_duplicate=False), module.named_buffers(name, remove_duplicate=False)
    )
    return dict(named)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another name of a tensor the checkpoint holds once, with the name it has there."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or {})


# Plans -------------------------------------------------------------------------------------------------------------


def plan(parts: Sequence[Part], budgets: Mapping[Device, int | None], strategy: str) -> Placement:
    """Places parts on devices by size; a pure function.

    budgets: the bytes that each device may hold, in the order the devices are filled, GPUs first; None: no limit.
    strategy: "sequential" fills one device after the other; "balanced" (and "auto") loads the GPUs evenly, and
        "balanced_low_0" all but the first, which gets what the others cannot hold. What the GPUs cannot hold goes to
        the CPU, what that cannot hold to the disk.

    Parts keep their order over the devices, but for tied ones, which go where the first of them goes. Where some are
    on the disk, the device that runs them keeps room for the largest.
    Raises ConfigError, with the sizes, if the budgets do not hold the model.
    """
    loads = _loads(parts)
    devices = [device for device in budgets if device != "disk"]
    limits = [_limit(budgets[device]) for device in devices]
    gpus = sum(device != "cpu" for device in devices)
    runner: Device = "cpu"
    placed = _fill(loads, limits)
    if len(placed) == len(loads):
        if strategy != "sequential" and len(_fill(loads, limits[:gpus])) == len(loads):
            placed = _fill(loads, _balanced(loads, limits[:gpus], strategy == "balanced_low_0"))
    else:
        largest = max(loads)
        last = next((index for index in reversed(range(len(devices))) if limits[index] >= largest), None)
        if last is None or "disk" not in budgets:
            raise _does_not_fit(parts, budgets)
        runner = devices[last]
        placed = _fill(loads, [*limits[:last], limits[last] - largest])
        if budgets["disk"] is not None and sum(loads[len(placed) :]) > budgets["disk"]:
            raise _does_not_fit(parts, budgets)
    first = [part for part in parts if part.tied_to is None]
    found: dict[str, Device] = {
        part.name: devices[placed[index]] if index < len(placed) else "disk" for index, part in enumerate(first)
    }
    return Placement(tuple(parts), {part.name: found[part.tied_to or part.name] for part in parts}, runner)


def _loads(parts: Sequence[Part]) -> list[int]:
    """The bytes of each part that is not tied to another, those that are tied to it included."""
    loads = {part.name: part.size for part in parts if part.tied_to is None}
    for part in parts:
        if part.tied_to is not None:
            loads[part.tied_to] += part.size
    return list(loads.values())


def _limit(budget: int | None) -> int:
    return 2**63 if budget is None else budget


def _fill(loads: Sequence[int], limits: Sequence[int]) -> list[int]:
    """The device of each load, one filled after the other; shorter than the loads if they do not all fit."""
    placed: list[int] = []
    device, used = 0, 0
    for load in loads:
        while device < len(limits) and used + load > limits[device]:
            device, used = device + 1, 0
        if device == len(limits):
            break
        placed.append(device)
        used += load
    return placed


def _balanced(loads: Sequence[int], limits: Sequence[int], low_first: bool) -> list[int]:
    """The least that each device has to be allowed for all to fit, within limits that hold the loads."""

    def fits(allowed: Sequence[int]) -> bool:
        return len(_fill(loads, allowed)) == len(loads)

    def least(allow: Any) -> list[int]:
        allowed: list[int] = allow(bisect_left(range(sum(loads)), True, key=lambda level: fits(allow(level))))
        return allowed

    if low_first and len(limits) > 1:
        first = least(lambda level: [min(level, limits[0]), *limits[1:]])[0]
        return least(lambda level: [first, *(min(level, limit) for limit in limits[1:])])
    return least(lambda level: [min(level, limit) for limit in limits])


def _does_not_fit(parts: Sequence[Part], budgets: Mapping[Device, int | None]) -> ConfigError:
    largest = max(parts, key=lambda part: part.size)
    allowed = ", ".join(
        f"{_shown(device)}: {'no limit' if size is None else megabytes(size)}" for device, size in budgets.items()
    )
    return ConfigError(
        f"the model does not fit: its weights take {megabytes(sum(part.size for part in parts))}, its largest part "
        f"({largest.name}) {megabytes(largest.size)}, and allowed are {allowed or 'none'}. A device that runs what is "
        "on the disk needs room for the largest part beside what it holds. Raise max_memory, or give more devices"
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _shown(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else device


# What users ask for -------------------------------------------------------------------------------------------------


def place(
    model: PreTrainedModel, device_map: DeviceMap | None, max_memory: Mapping[int | str, int | str] | None = None
) -> Placement:
    """The placement a `device_map` and a `max_memory` ask for; raises ConfigError if they cannot be followed."""
    parts = parts_of(model)
    if isinstance(device_map, Mapping):
        placement = _from_mapping(model, parts, device_map)
    elif isinstance(device_map, str) and device_map in STRATEGIES:
        placement = plan(parts, memory_budgets(max_memory), device_map)
        _warn_of_spilling(placement)
    else:
        device = "cpu" if device_map is None else device_named(device_map)
        placement = Placement(parts, {part.name: device for part in parts})
    if max_memory is not None and device_map not in STRATEGIES:
        warnings.warn("max_memory is not used: the device_map says where everything goes", stacklevel=4)
    return placement


def _from_mapping(model: PreTrainedModel, parts: tuple[Part, ...], device_map: Mapping[str, Any]) -> Placement:
    names = {name for name, _ in model.named_modules()} | {name for part in parts for name in part.tensors}
    for name in device_map:
        if name not in names:
            raise ConfigError(f"the device_map names {name!r}, which is no module of this model")
    wanted = {name: device_named(device) for name, device in device_map.items()}
    devices: dict[str, Device] = {}
    for part in parts:
        entries = {_entry_of(tensor, wanted): tensor for tensor in part.tensors}
        if None in entries:
            raise ConfigError(
                f"the device_map leaves out some modules, {entries[None]} among them; give every one a device, or '' "
                "for the rest"
            )
        if len({wanted[str(entry)] for entry in entries}) > 1:
            split = " and ".join(f"{wanted[str(entry)]!r} for {tensor}" for entry, tensor in entries.items())
            raise ConfigError(f"the device_map splits {part.name}, which has to be whole on one device: it has {split}")
        devices[part.name] = wanted[str(next(iter(entries)))]
        if part.tied_to is not None and devices[part.name] != devices[part.tied_to]:
            raise ConfigError(
                f"the device_map puts {part.name} on {devices[part.name]!r} and {part.tied_to} on "
                f"{devices[part.tied_to]!r}, but they share their weight; give both the same device"
            )
    return Placement(parts, devices, _runner(devices))


def _entry_of(name: str, wanted: Mapping[str, Device]) -> str | None:
    """The entry that says where a tensor goes: the nearest above it."""
    while name not in wanted:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _runner(devices: Mapping[str, Device]) -> Device:
    """What is on the disk runs where the part before it does, so that nothing moves for it."""
    in_order = list(devices.values())
    first = in_order.index("disk") if "disk" in in_order else len(in_order)
    held = [device for device in (*reversed(in_order[:first]), *in_order[first:]) if device != "disk"]
    return held[0] if held else "cpu"


def memory_budgets(max_memory: Mapping[int | str, int | str] | None) -> dict[Device, int | None]:
    """The bytes that each device may hold: GPUs first, then the CPU, then the disk, without a limit unless given one.

    max_memory: bytes, or strings such as "20GiB"; devices it does not name hold nothing. None: most of what is free on
    every GPU, and what is free on the CPU.
    """
    if max_memory is None:
        free = get_max_memory()
        budgets: dict[Device, int | None] = {
            device: size if device == "cpu" else int(size * _SHARE_FOR_WEIGHTS) for device, size in free.items()
        }
    elif isinstance(max_memory, Mapping):
        budgets = {}
        for key, size in max_memory.items():
            device = device_named(key, "max_memory names", "Devices are numbers of GPUs, 'cpu' and 'disk'")
            if device in budgets:
                raise ConfigError(f"max_memory names {key!r} twice, in two ways; name every device once")
            budgets[device] = _byte_count(size)
            if budgets[device] is None:
                raise _bad_memory(max_memory)
    else:
        raise _bad_memory(max_memory)
    budgets.setdefault("disk", None)
    order = {"cpu": 1, "disk": 2}
    return dict(sorted(budgets.items(), key=lambda entry: (order.get(str(entry[0]), 0), str(entry[0]).zfill(8))))


def byte_count(size: Any, name: str) -> int:
    """A number of bytes, given as one or as a string such as "20GiB"; `name` is what the error calls it."""
    count = _byte_count(size)
    if not count:
        raise ConfigError(f"{name} is {size!r}; it should be a number of bytes or a string such as '20GiB'")
    return count


def _byte_count(size: Any) -> int | None:
    try:
        # In capitals: a small b would be taken for bits.
        count = convert_file_size_to_int(size.strip().upper()) if isinstance(size, str) else size
    except ValueError:
        return None
    return count if type(count) is int and count >= 0 else None


def _bad_memory(max_memory: Any) -> ConfigError:
    return ConfigError(f"max_memory is {max_memory!r}; it should be a dict such as {{0: '20GiB', 'cpu': '60GiB'}}")


def _warn_of_spilling(placement: Placement) -> None:
    """Says what runs slower than the user may expect."""
    if set(placement.devices.values()) <= {"cpu"} or not {"cpu", "disk"} & set(placement.devices.values()):
        return
    sizes: dict[str, int] = {}
    for part in placement.parts:
        place = placement.devices[part.name]
        if place in ("cpu", "disk"):
            sizes[str(place)] = sizes.get(str(place), 0) + part.size
    where = {"cpu": "run on the CPU", "disk": "are read from the disk whenever they run"}
    spilled = " and ".join(f"{megabytes(size)} {where[place]}" for place, size in sizes.items())
    total = megabytes(sum(part.size for part in placement.parts))
    warnings.warn(f"the memory allowed does not hold the model: of its {total}, {spilled}", stacklevel=5)


def torch_device(device: Device) -> torch.device:
    """The device that `Device` writes."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


_CHOICES = (
    f"It should be one of {', '.join(STRATEGIES)}, a device such as 'cpu' or 'cuda:0', or a dict from module names to "
    "devices"
)


def device_named(device: Any, asks: str = "device_map asks for", choices: str = _CHOICES) -> Device:
    """A device that is there, as accelerate writes it; `asks` begins the error's sentence, `choices` ends it."""
    try:
        if isinstance(device, str) and device == "disk":
            return "disk"
        found = torch.device("cuda", device) if type(device) is int else torch.device(device)
        if (found.type == "cuda" and 0 <= (found.index or 0) < torch.cuda.device_count()) or found.type == "cpu":
            return _written(found)
        torch.empty(0, device=found)
        if found.type not in ("cuda", "meta"):
            return _written(found)
        problem = "it is not on this machine"
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(f"{asks} {device!r}: {problem}. {choices}")


def present_device_map(model: PreTrainedModel) -> dict[str, Device]:
    """Where the parts of a model in memory are now."""
    parts = parts_of(model)
    devices = {part.name: _written(_tensor(model, part.tensors[0]).device) for part in parts}
    return Placement(parts, devices).device_map()


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def _written(device: torch.device) -> Device:
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    return "cpu" if device.type == "cpu" else str(device)
