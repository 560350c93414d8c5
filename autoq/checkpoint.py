"""Checkpoint directories: safetensors read without trusting them, and written so that no half of one ever loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoq.errors import CheckpointError
from autoq.formats import TensorSpec

CONFIG = "config.json"
REPORT = "quantization_report.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# What a save that fails leaves.
_AS_IT_WAS = "What was there before is as it was"

# Linux follows a hint only as far as its read-ahead window, which is this or more.
_HINT = 2**17

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} a complete checkpoint?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; the file is damaged")
    return value


def lacks_tensor(place: str | Path, name: str) -> CheckpointError:
    """The error of a checkpoint without a tensor that its model has."""
    return CheckpointError(f"{place} has no tensor {name}; the checkpoint is incomplete or not of this model")


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """While open, a file or directory is written; raises CheckpointError where that fails, as on a full disk.

    kept: a sentence about what is not lost then.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} could not be written ({error}); make room or choose another place. {kept}"
        ) from None


def read_ahead(path: Path, start: int, end: int) -> None:
    """Has the system read a part of a file into memory while other work is done, where it can."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            for offset in range(start, end, _HINT):
                os.posix_fadvise(file.fileno(), offset, min(_HINT, end - offset), os.POSIX_FADV_WILLNEED)


class CheckpointReader:
    """The tensors of a checkpoint directory, memory-mapped; only safetensors files are ever opened.

    specs: dtype and shape of every tensor, by name; read from the headers, so tensors can be checked before any
    is loaded.
    paths: the file that holds each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.specs: dict[str, TensorSpec] = {}
        self.paths: dict[str, Path] = {}
        self._files: dict[str, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # where the tensors begin, and what is told of them
        for file, names in self._listing().items():
            self._open(file, names)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._files.clear()

    def _listing(self) -> dict[str, set[str] | None]:
        """The files to open, and which tensors each should hold (None: whatever it holds)."""
        if (self.directory / _INDEX).is_file():
            return self._indexed_files()
        if (self.directory / _SINGLE).is_file():
            return {_SINGLE: None}
        others = sorted(entry.name for entry in self.directory.glob("*.safetensors"))
        if len(others) == 1:
            return {others[0]: None}
        pickles = sorted(entry.name for entry in self.directory.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.directory} holds {pickles[0]}, a pickle, which can run code when it is opened; autoq loads "
                "safetensors only. Convert it with the software that wrote it."
            )
        raise CheckpointError(f"{self.directory} holds neither {_SINGLE} nor {_INDEX}; it is not a complete checkpoint")

    def _indexed_files(self) -> dict[str, set[str] | None]:
        path = self.directory / _INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map; the file is damaged")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or Path(file).name != file
                or "\\" in file
            ):
                raise CheckpointError(
                    f"{path} places the tensor {name} in {file!r}; a shard must be a .safetensors file in the same "
                    "directory. Do not use this checkpoint unless you know where it comes from."
                )
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        return files

    def _open(self, file: str, expected: set[str] | None) -> None:
        path = self.directory / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete")
        try:
            handle = safe_open(path, framework="pt")
            found = set(handle.keys())
            for name in found if expected is None else expected & found:
                entry = handle.get_slice(name)
                kind = entry.get_dtype()
                if kind not in _DTYPES:
                    raise CheckpointError(f"{path}: the tensor {name} has the dtype {kind}, which is not supported")
                self.specs[name] = TensorSpec(_DTYPES[kind], tuple(entry.get_shape()))
                self._files[name] = handle
                self.paths[name] = path
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); it is truncated or damaged") from None
        absent = sorted((expected or set()) - found)
        if absent:
            raise CheckpointError(f"{path} lacks the tensor {absent[0]}, which {_INDEX} places in it")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self._files:
            raise lacks_tensor(self.directory, name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def range_of(self, name: str) -> tuple[int, int]:
        """The first byte of a tensor in its file, and the one behind its last."""
        path = self.paths[name]
        if path not in self._headers:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + size, json.loads(file.read(size))
        base, header = self._headers[path]
        start, end = header[name]["data_offsets"]
        return base + start, base + end

    def read_ahead(self, names: Iterable[str]) -> None:
        """Has the system read tensors into memory while other work is done, where it can."""
        for name in names:
            read_ahead(self.paths[name], *self.range_of(name))

    def check(self, name: str, wanted: TensorSpec) -> None:
        """Raises CheckpointError unless the tensor exists with this dtype and shape."""
        found = self.specs.get(name)
        if found is None:
            raise lacks_tensor(self.directory, name)
        if found != wanted:
            raise CheckpointError(
                f"{self.directory}: the tensor {name} is {found.dtype} of shape {list(found.shape)}, where the config "
                f"asks for {wanted.dtype} of shape {list(wanted.shape)}"
            )


class _ShardWriter:
    """Writes tensors to shards of limited size, and the index that finds them again."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def _shard(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        # Tensors that share memory (views, ties) would be refused: each is saved on its own.
        tensors = {
            name: tensor.clone() if tensor._base is not None else tensor for name, tensor in self._pending.items()
        }
        with writing(self._directory.parent, _AS_IT_WAS):
            save_file(tensors, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Names the shards as transformers does, now that their number is known."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._shard(0).rename(self._directory / _SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._shard(number).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], documents: Mapping[str, str], shard_bytes: int
) -> None:
    """Writes a checkpoint so that at every moment the directory holds a complete one or none.

    Everything is written and flushed to disk in a directory of its own first: beside a target that does not exist,
    which is then made by one rename; inside one that does, so that both are on one file system. There the old
    config.json goes first and the new one comes last: a directory without it does not load. Only files that belong
    to the old checkpoint are removed.

    tensors: pairs of name and tensor, consumed one at a time.
    documents: text files by name, config.json among them.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} exists and is not a directory; choose another place to save to")
    _refuse_to_replace_a_full_model(directory)
    with writing(directory, "Nothing was there before"):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with _staging_directory(directory) as staging:
        writer = _ShardWriter(staging, shard_bytes)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish()
        for name, text in documents.items():
            (staging / name).write_text(text, encoding="utf-8")
        mode = 0o666 & ~_umask()
        for path in staging.iterdir():
            path.chmod(mode)  # safetensors are written for their owner alone
            _flush_to_disk(path)
        if staging.parent == directory:
            _replace_contents(directory, staging)
        else:
            os.replace(staging, directory)
        _flush_to_disk(directory.parent)


def _refuse_to_replace_a_full_model(directory: Path) -> None:
    """A full-precision model is the source of others: it is not overwritten by mistake."""
    try:
        config = read_json(directory / CONFIG)
    except CheckpointError:
        return
    if "quantization_config" not in config and any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} holds a model that is not quantized; save the quantized one somewhere else")


@contextmanager
def _staging_directory(directory: Path) -> Iterator[Path]:
    """An empty directory on the file system of the target: within it if it exists, beside it otherwise."""
    parent, prefix = (directory, "") if directory.exists() else (directory.parent, f"{directory.name}.")
    for leftover in parent.glob(f".{prefix}partial-*"):
        if not _is_running(leftover.name.split("-")[1]):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    with writing(directory, _AS_IT_WAS):
        staging = Path(tempfile.mkdtemp(prefix=f".{prefix}partial-{os.getpid()}-", dir=parent))
    staging.chmod(0o777 & ~_umask())
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace_contents(directory: Path, staging: Path) -> None:
    stale = _owned_files(directory)
    (directory / CONFIG).unlink(missing_ok=True)
    _flush_to_disk(directory)
    for old in stale:
        old.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name == CONFIG:
            _flush_to_disk(directory)
        os.replace(path, directory / path.name)
    _flush_to_disk(directory)


def _owned_files(directory: Path) -> list[Path]:
    """The files of the checkpoint in a directory, but for its config.json; others' files, such as adapters, stay."""
    owned = [directory / name for name in (_INDEX, _SINGLE, REPORT)]
    return owned + [path for path in directory.glob("model-*.safetensors") if _SHARD.fullmatch(path.name)]


def _flush_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
