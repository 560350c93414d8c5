"""The directory a run works in: what became of each block, and what a stopped run goes on from.

`run.json` says which run it is, `block-*.safetensors` hold the tensors of the blocks that are done, with their lines of
the report and what the search found. Each file is written beside and renamed, so that it is whole or not there. The
directory belongs to one run: one with other settings, samples or weights is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from autoq._version import __version__
from autoq.errors import CheckpointError, ConfigError
from autoq.nn.spread import in_memory
from autoq.quantization.report import LinearReport
from autoq.quantization.search import BlockResult, SearchResults
from autoq.quantization.statistics import InputStatistics

_RUN = "run.json"
# Evenly spaced elements of each weight that tell one model from another of the same shape.
_SAMPLED = 64


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, flushed to the disk; all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, partial, metadata=dict(metadata))
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def fingerprint_of_model(model: PreTrainedModel) -> str:
    """Tells models apart by their config and some of every weight; reads little, also of weights on the disk."""
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for owner, module in model.named_modules():
        with in_memory(module, owner):
            for leaf, parameter in module.named_parameters(recurse=False):
                flat = parameter.detach().flatten()
                some = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
                digest.update(f"{owner}.{leaf} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_samples(samples: Sequence[Tensor]) -> str:
    """Tells calibration samples apart."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.numel()} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


class Workspace:
    """The files of a run, in `directory`."""

    def __init__(self, directory: Path, blocks: int, identity: Mapping[str, Any], used: Mapping[str, Any]) -> None:
        """Opens the directory for a run, or makes it.

        blocks: how many the model has. identity: what tells the run from others, as JSON holds it. used: what else
        decides about a block, but not any more once all are done: statistics and search results, which the run itself
        may have written at its end.
        Raises ConfigError, naming what differs, if another run's work is there.
        """
        self.directory = directory
        identity = json.loads(json.dumps({**identity, **used, "autoq_version": __version__}))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / _RUN
            if path.is_file():
                decided = tuple(used) if self.finished(blocks) == blocks else ()
                _check_identity(directory, json.loads(path.read_text(encoding="utf-8")), identity, decided)
            elif any(not entry.name.startswith(".") for entry in directory.iterdir()):
                raise ConfigError(
                    f"{directory} holds files that are not of a quantization; give work_dir a directory of its own"
                )
            else:
                write_json(path, identity)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{directory} cannot be used as the work_dir ({error})") from None

    def block_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    @property
    def sensitivities_path(self) -> Path:
        """Where it is kept how much each linear matters."""
        return self.directory / "sensitivities.json"

    def finished(self, blocks: int) -> int:
        """How many blocks, from the first on, are done."""
        return next((index for index in range(blocks) if not self.block_path(index).is_file()), blocks)

    def save_block(self, index: int, tensors: Mapping[str, Tensor], result: BlockResult) -> None:
        """Keeps what became of a block: its tensors, by their names within it, and its part of the report."""
        scales, clips = list(result.search.scales.items()), list(result.search.clips.items())
        found = {f"search.scale.{number}": scale for number, (_, scale) in enumerate(scales)}
        found.update({f"search.clip.{number}": ranges for number, (_, ranges) in enumerate(clips)})
        metadata = {
            "reports": json.dumps([asdict(report) for report in result.reports]),
            "scales": json.dumps([names for names, _ in scales]),
            "clips": json.dumps([name for name, _ in clips]),
        }
        block = {f"block.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(self.block_path(index), {**block, **found}, metadata)

    def load_block(self, index: int) -> tuple[dict[str, Tensor], BlockResult]:
        """What `save_block` kept."""
        path = self.block_path(index)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                reports = [LinearReport(**report) for report in json.loads(metadata["reports"])]
                search = SearchResults(
                    {
                        (names[0], tuple(names[1])): file.get_tensor(f"search.scale.{number}")
                        for number, names in enumerate(json.loads(metadata["scales"]))
                    },
                    {
                        name: file.get_tensor(f"search.clip.{number}")
                        for number, name in enumerate(json.loads(metadata["clips"]))
                    },
                )
                tensors = {
                    name.removeprefix("block."): file.get_tensor(name).clone()
                    for name in file.keys()  # noqa: SIM118  (not a dict)
                    if name.startswith("block.")
                }
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it to have the block quantized again") from None
        return tensors, BlockResult(reports, search)

    def offload_index(self, index: int, prefix: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Where accelerate finds the tensors of a block that is done."""
        file = str(self.block_path(index))
        return {f"{prefix}.{name}": {"safetensors_file": file, "weight_name": f"block.{name}"} for name in names}


def _check_identity(directory: Path, found: Any, wanted: Mapping[str, Any], ignored: Sequence[str]) -> None:
    if not isinstance(found, dict):
        raise ConfigError(f"{directory / _RUN} is damaged; delete {directory} to begin anew")
    names = [name for name in {**wanted, **found} if name not in ignored]
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if different:
        shown = ", ".join(different)
        raise ConfigError(
            f"{directory} holds the work of another run: {shown} differ. Give another work_dir, or delete this one to "
            "begin anew"
        )


class StatisticsStore:
    """The statistics of all blocks of a model, in a directory: for other bits and group sizes without calibrating.

    `statistics.json` comes last and says of which model and data they are; without it the directory is not complete.
    """

    _FILE = "statistics.json"

    def __init__(self, directory: Path, model: str) -> None:
        """model: its fingerprint. Raises ConfigError if the directory has another model's statistics."""
        self.directory = directory
        self._model = model
        self.description = ""
        self.tokens = 0
        self.names: list[str] = []
        path = directory / self._FILE
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                found = content["model"]
                self.description, self.tokens = str(content["calibration"]), int(content["tokens"])
                self.names = list(content["names"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is damaged ({error}); delete {directory} to collect them again"
                ) from None
            if found != model:
                raise ConfigError(f"the statistics in {directory} are of another model; give another directory")

    @property
    def is_complete(self) -> bool:
        """Whether the statistics of a whole model are there."""
        return bool(self.names)

    def save(self, name: str, statistics: Mapping[str, InputStatistics]) -> None:
        """Keeps the statistics of a block, or of the head, by leader."""
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"{leader}.gram": entry.gram for leader, entry in statistics.items()}
        tensors.update({f"{leader}.absolute": entry.absolute for leader, entry in statistics.items()})
        tokens = {leader: str(entry.tokens) for leader, entry in statistics.items()}
        write_tensors(self._path(name), tensors, tokens)

    def load(self, name: str, device: torch.device) -> dict[str, InputStatistics]:
        """What `save` kept, on a device."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                return {
                    leader: InputStatistics.of(
                        file.get_tensor(f"{leader}.gram").to(device, copy=True),
                        file.get_tensor(f"{leader}.absolute").to(device, copy=True),
                        int(tokens),
                    )
                    for leader, tokens in file.metadata().items()
                }
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is missing or damaged ({error}); delete {self.directory}") from None

    def finish(self, names: Sequence[str], description: str, tokens: int) -> None:
        """Declares the directory complete."""
        content = {"model": self._model, "calibration": description, "tokens": tokens, "names": list(names)}
        write_json(self.directory / self._FILE, content)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"
