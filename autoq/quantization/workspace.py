"""The directory a run works in: what became of each block, and what a stopped run goes on from.

`run.json` says which run it is, `block-*.safetensors` hold the tensors of the blocks that are done, with their lines of
the report and what the search found. Each file is written beside and renamed, so that it is whole or not there. The
directory belongs to one run: one with other settings, samples or weights is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from autoq._version import __version__
from autoq.checkpoint import writing
from autoq.errors import CheckpointError, ConfigError
from autoq.nn.spread import in_memory
from autoq.quantization.activations import KEPT
from autoq.quantization.report import LinearReport
from autoq.quantization.search import BlockResult, SearchResults
from autoq.quantization.statistics import InputStatistics

_RUN = "run.json"
_ACTIVATIONS = "activations-"
_SENSITIVITIES = "sensitivities.json"
# Evenly spaced elements of each weight that tell one model from another of the same shape.
_SAMPLED = 64
_PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside its place, flushed to the disk and renamed: all of it is there, or nothing.

    Raises CheckpointError where that fails, as on a full disk.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    with writing(path, KEPT):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()  # it is there only if something failed


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; all of it or nothing."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; all of it or nothing."""
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda partial: save_file(on_cpu, partial, metadata=dict(metadata)))


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

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()

    def open(self, blocks: int, identity: Mapping[str, Any], used: Mapping[str, Any], processes: int) -> None:
        """Makes the directory, or takes up the run that was stopped there.

        blocks: how many the model has. identity: what tells the run from others, as JSON holds it. used: what else
        decides about a block, but not any more once all are done: statistics and search results, which the run itself
        may have written at its end. processes: how many share the run; hidden states of another division are of no use.
        Raises ConfigError, naming what differs, if another run's work is there.
        """
        directory = self.directory
        identity = json.loads(json.dumps({**identity, **used, "autoq_version": __version__}))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            entries = list(directory.iterdir())
        except OSError as error:
            raise ConfigError(f"{directory} cannot be used as the work_dir ({error})") from None
        path = directory / _RUN
        if path.is_file():
            decided = tuple(used) if self.finished(blocks) == blocks else ()
            _check_identity(directory, path, identity, decided)
        elif any(not entry.name.startswith(".") for entry in entries):
            raise ConfigError(
                f"{directory} holds files that are not of a quantization; give work_dir a directory of its own"
            )
        else:
            write_json(path, identity)
        for entry in entries:
            if entry.name.endswith(_PARTIAL):
                entry.unlink(missing_ok=True)
            elif entry.name.startswith(_ACTIVATIONS) and not entry.name.endswith(f"-of-{processes}"):
                shutil.rmtree(entry, ignore_errors=True)

    def activations_path(self, rank: int, processes: int) -> Path:
        """Where a process keeps hidden states."""
        return self.directory / f"{_ACTIVATIONS}{rank}-of-{processes}"

    def block_path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"

    def save_sensitivities(self, sensitivities: Mapping[str, Mapping[int, float]]) -> None:
        """Keeps how much each linear matters, by width."""
        write_json(self.directory / _SENSITIVITIES, sensitivities)

    def load_sensitivities(self) -> dict[str, dict[int, float]] | None:
        """What `save_sensitivities` kept; None if there is nothing that can be read."""
        try:
            stored = json.loads((self.directory / _SENSITIVITIES).read_text(encoding="utf-8"))
            return {name: {int(bits): float(error) for bits, error in of.items()} for name, of in stored.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return None

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


def _check_identity(directory: Path, path: Path, wanted: Mapping[str, Any], ignored: Sequence[str]) -> None:
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete {directory} to begin anew") from None
    names = [name for name in {**wanted, **found} if name not in ignored]
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if different:
        raise ConfigError(
            f"{directory} holds the work of another run: {', '.join(different)} differ. Give another work_dir, or "
            "delete this one to begin anew"
        )


class StatisticsStore:
    """The statistics of all blocks of a model, in a directory: for other bits and group sizes without calibrating.

    `statistics.json` says of which model and data they are, from the start, and at the end what is there: until then
    the directory is not complete.
    """

    _FILE = "statistics.json"

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """Opens a directory; `begin` makes it, if it is to be filled.

        identity: "model" and "samples", their fingerprints, and "calibration" and "tokens", what the report says.
        Raises ConfigError if it holds another model's statistics, or a part of those of other data.
        """
        self.directory = directory.absolute()
        self._identity = dict(identity)
        self.names: list[str] = []
        path = self.directory / self._FILE
        if not path.is_file():
            if self.directory.is_dir() and any(self.directory.glob("[!.]*")):
                raise ConfigError(
                    f"{directory} holds files that are not statistics; give statistics a directory of its own"
                )
            return
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
            self.names = [str(name) for name in found.pop("names")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {directory} to collect them again") from None
        if found.get("model") != identity["model"]:
            raise ConfigError(f"the statistics in {directory} are of another model; give another directory")
        if not self.names and found.get("samples") != identity["samples"]:
            raise ConfigError(
                f"{directory} holds a part of the statistics of other calibration data; delete it, or give another one"
            )
        self._identity = found

    @property
    def samples(self) -> str:
        """The fingerprint of the samples that the statistics are of."""
        return str(self._identity["samples"])

    @property
    def is_complete(self) -> bool:
        """Whether the statistics of a whole model are there."""
        return bool(self.names)

    @property
    def description(self) -> str:
        return f"{self._identity.get('calibration')} (statistics collected earlier)"

    @property
    def tokens(self) -> int:
        return int(self._identity.get("tokens", 0))

    def has(self, name: str) -> bool:
        """Whether the statistics of a block, or of the head, are there."""
        return self._path(name).is_file()

    def begin(self) -> None:
        """Says whose statistics are going to be there."""
        write_json(self.directory / self._FILE, {**self._identity, "names": []})

    def save(self, name: str, statistics: Mapping[str, InputStatistics]) -> None:
        """Keeps the statistics of a block, or of the head, by leader."""
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
                    for leader, tokens in (file.metadata() or {}).items()
                }
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); delete {self.directory} to collect the statistics again"
            ) from None

    def finish(self, names: Sequence[str]) -> None:
        """Declares the directory complete."""
        write_json(self.directory / self._FILE, {**self._identity, "names": list(names)})

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"
