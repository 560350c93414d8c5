"""Calibration data: whatever text, chats or tokens the user has, turned into token tensors.

A *source* is the data as given: an iterable of items with a name. An item is a text, a chat (a list of messages), a
row (a mapping with a column that holds one of these) or token ids. Items are read one at a time and reading stops as
soon as there are tokens enough, so that a large file or data set costs no more than the part that is used.
"""

from __future__ import annotations

import json
import platform
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from autoq.errors import CalibrationError

# Columns that hold a sample, in the order in which they are looked for, after the text column the user names.
_CHAT_COLUMNS = ("messages", "conversations")
_TOKEN_COLUMN = "input_ids"

# The role names of ShareGPT files, whose messages are {"from": ..., "value": ...}.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

# Examples a streamed data set holds to shuffle among them.
_SHUFFLE_BUFFER = 1000

# What leaving out an argument means.
_DEFAULTS = {
    "calib_data": "to calibrate on the text that comes with Python, which needs no network",
    "eval_data": "to judge by what the calibration leaves over of its data",
}


class _HubDataset(NamedTuple):
    """What `datasets.load_dataset` is asked for; among the aliases, a split of None leaves the choice to the user."""

    path: str
    config: str | None = None
    split: str | None = None


# Names in common use for data sets that live under another name, or need a configuration.
_DATASET_ALIASES = {
    "pileval": _HubDataset("mit-han-lab/pile-val-backup", split="validation"),
    "wikitext": _HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
_DATASET_NAME = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


class _Source(NamedTuple):
    items: Iterable[Any]
    name: str


class _Request(NamedTuple):
    """How data is to be read, and the argument that it was passed as."""

    argument: str
    split: str
    text_column: str
    seed: int

    @property
    def alternatives(self) -> str:
        return (
            "pass a list of strings, a .txt, .jsonl, .json or .parquet file, "
            f"or leave {self.argument} out {_DEFAULTS[self.argument]}"
        )


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token samples to calibrate on.

    samples: 1-D int64 tensors of token ids on the CPU, none of them empty.
    source: one line that tells where they came from.
    """

    samples: tuple[Tensor, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens in all samples together."""
        return sum(sample.numel() for sample in self.samples)

    def split(self, count: int) -> tuple[CalibrationSet, CalibrationSet | None]:
        """The first `count` samples, and the others, if there are."""
        rest = self.samples[count:]
        return CalibrationSet(self.samples[:count], self.source), CalibrationSet(rest, self.source) if rest else None

    def overlaps(self, other: CalibrationSet) -> bool:
        """Whether the two have a sample in common."""
        ours = {sample.numpy().tobytes() for sample in self.samples}
        return any(sample.numpy().tobytes() in ours for sample in other.samples)

    def describe(self) -> str:
        """One line with the number of samples and tokens and where they came from."""
        samples = "1 sample" if len(self.samples) == 1 else f"{len(self.samples):,} samples"
        return f"calibration: {samples}, {self.tokens:,} tokens, from {self.source}"


def load_calibration(
    tokenizer: Any,
    calib_data: Any = None,
    *,
    max_samples: int = 128,
    max_seq_len: int = 512,
    packing: bool = True,
    split: str = "train",
    text_column: str = "text",
    seed: int = 0,
    vocab_size: int | None = None,
    argument: str = "calib_data",
) -> CalibrationSet:
    """Turns calibration data into at most `max_samples` samples of at most `max_seq_len` tokens.

    tokenizer: a transformers tokenizer; may be None when the data is tokens.
    calib_data: one of
        - None: the Python language reference, which Python itself brings along; no network is needed;
        - a list of strings, of chats (lists of `{"role", "content"}` messages), of rows (mappings with one of the
          columns below) or of token lists;
        - a path to a .txt file (samples separated by blank lines), a .json file (a list as above), a .jsonl file
          (one item of such a list per line) or a .parquet file (rows);
        - a `datasets` object, or the name of one: "pileval", "wikitext", "org/name", "org/name:config";
        - token ids: a 1-D or 2-D tensor, a list of 1-D tensors, or what a tokenizer returns (`input_ids`, from which
          tokens that `attention_mask` hides are left out).
      In a row the first of the columns `text_column`, "messages", "conversations" and "input_ids" is the sample.
    packing: True joins the samples token by token and cuts them into windows of exactly `max_seq_len`, so that no
        part of a long sample is dropped; tokens left over after the last full window are dropped unless they are
        all there is. Texts are then encoded without special tokens, since a window starts anywhere in a text.
        False makes one sample of each text, cut to `max_seq_len`, and encodes it the way the model expects a text
        to start (with BOS, where the tokenizer adds one).
    split: the split of a data set, where it has several.
    seed: data sets and the default text are shuffled under this seed. Lists, files and tensors keep their order.
    vocab_size: rows of the model's embedding; token ids must be below it. Default: those the tokenizer
        knows.
    argument: what the user passes the data as, for errors: "calib_data" or "eval_data".

    Raises CalibrationError when the data is empty, missing, unreadable, of an unknown kind or not tokens of this model.
    """
    if not (tokenizer is None or callable(tokenizer)):
        raise CalibrationError(
            f"tokenizer is {tokenizer!r}; it should be the model's tokenizer, as AutoTokenizer.from_pretrained gives it"
        )
    for name, value in (("max_samples", max_samples), ("max_seq_len", max_seq_len)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}; calibration needs at least 1")
    request = _Request(argument, split, text_column, seed)
    source = _open_source(calib_data, request)
    if vocab_size is None and tokenizer is not None:
        vocab_size = max(tokenizer.get_vocab().values()) + 1  # not its length: ids may have gaps
    reader = _Reader(tokenizer, text_column, special_tokens=not packing, vocab_size=vocab_size, source=source.name)
    sequences = reader.read(source.items)
    samples = _pack(sequences, max_samples, max_seq_len) if packing else _truncate(sequences, max_samples, max_seq_len)
    if not samples:
        raise CalibrationError(f"{argument}: {source.name} holds no tokens; {request.alternatives}")
    return CalibrationSet(samples, source.name)


def _pack(sequences: Iterable[Tensor], max_samples: int, max_seq_len: int) -> tuple[Tensor, ...]:
    collected: list[Tensor] = []
    missing = max_samples * max_seq_len
    for sequence in sequences:
        collected.append(sequence[:missing])
        missing -= collected[-1].numel()
        if missing == 0:
            break
    if not collected:
        return ()
    windows: tuple[Tensor, ...] = torch.split(torch.cat(collected), max_seq_len)
    return windows[:-1] if len(windows) > 1 and windows[-1].numel() < max_seq_len else windows


def _truncate(sequences: Iterable[Tensor], max_samples: int, max_seq_len: int) -> tuple[Tensor, ...]:
    return tuple(sequence[:max_seq_len] for sequence in islice(sequences, max_samples))


@dataclass(frozen=True)
class _Reader:
    """Turns the items of a source into token ids."""

    tokenizer: Any
    text_column: str
    special_tokens: bool
    vocab_size: int | None
    source: str

    def read(self, items: Iterable[Any]) -> Iterator[Tensor]:
        """The token ids of each item that has any, as 1-D int64."""
        for index, item in enumerate(items):
            ids = self._encode(item, f"item {index} of {self.source}")
            if ids.numel():
                self._check_range(ids, f"item {index} of {self.source}")
                yield ids

    def _encode(self, item: Any, where: str) -> Tensor:
        if isinstance(item, str):
            return self._encode_text(item, self.special_tokens)
        if isinstance(item, Mapping):
            return self._encode_row(item, where)
        if _is_chat(item):
            return self._encode_chat(item, where)
        return _token_ids(item, where)

    def _encode_text(self, text: str, special_tokens: bool) -> Tensor:
        if not text.strip():
            return torch.empty(0, dtype=torch.int64)
        if self.tokenizer is None:
            raise CalibrationError(f"{self.source} holds text, which needs a tokenizer; pass one, or pass token ids")
        # Not verbose: a text longer than the model's context is fine here, it is cut afterwards.
        try:
            ids = self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        except TypeError as error:  # JSON can spell half a character, which tokenizers take for no string at all
            raise CalibrationError(f"{self.source} holds a text that is not valid Unicode; remove it") from error
        return torch.tensor(ids, dtype=torch.int64)

    def _encode_row(self, row: Mapping[str, Any], where: str) -> Tensor:
        column = _sample_columns(row, self.text_column, where)[0]
        value = row[column]
        if value is None:
            return torch.empty(0, dtype=torch.int64)
        if isinstance(value, Mapping):
            raise CalibrationError(
                f"column {column!r} of {where} holds a mapping; a text, a chat or tokens were expected"
            )
        mask = row.get("attention_mask") if column == _TOKEN_COLUMN else None
        ids = self._encode(value, f"column {column!r} of {where}")
        return ids if mask is None else _unmasked(ids, _token_ids(mask, f"column 'attention_mask' of {where}"), where)

    def _encode_chat(self, chat: Sequence[Mapping[str, Any]], where: str) -> Tensor:
        if not getattr(self.tokenizer, "chat_template", None):
            raise CalibrationError(
                f"{where} is a chat, but the tokenizer has no chat template; "
                "set tokenizer.chat_template, or pass the chats as plain strings"
            )
        messages = [_message(message, where) for message in chat]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        # A template is a program of its own and may raise anything.
        except Exception as error:
            raise CalibrationError(f"the tokenizer's chat template cannot render {where}: {_reason(error)}") from error
        # The template has written the special tokens already.
        return self._encode_text(text, special_tokens=False)

    def _check_range(self, ids: Tensor, where: str) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0:
            raise CalibrationError(f"{where} holds the token id {low}; token ids are 0 or more, leave padding out")
        if self.vocab_size is not None and high >= self.vocab_size:
            raise CalibrationError(
                f"{where} holds the token id {high}, but the vocabulary has {self.vocab_size} tokens; "
                "use the tokenizer that belongs to the model"
            )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(entry, Mapping) for entry in value)


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message with the keys chat templates read. Other keys, such as tool calls, are kept."""
    if not _is_message(message):
        raise CalibrationError(
            f"a message of {where} has the keys {_listing(message)}; 'role' and 'content' are needed"
        )
    if "role" in message:
        return dict(message)
    return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _token_ids(value: Any, where: str) -> Tensor:
    """A tensor, array or list of integers as 1-D int64 on the CPU."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"{where} is {_described(value)}; a string, a chat, a row or token ids were expected"
        ) from None
    if ids.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if ids.is_floating_point() or ids.is_complex():
        raise CalibrationError(f"{where} holds {ids.dtype} numbers; token ids are integers")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise CalibrationError(f"{where} has the shape {tuple(ids.shape)}; token ids of one sample are a 1-D tensor")
    return ids.to("cpu", torch.int64)


def _unmasked(ids: Tensor, mask: Tensor, where: str) -> Tensor:
    if mask.shape != ids.shape:
        raise CalibrationError(f"{where} has {ids.numel()} tokens but {mask.numel()} entries in its attention_mask")
    return ids[mask != 0]


def _sample_columns(columns: Iterable[str], text_column: str, where: str) -> list[str]:
    """The columns to read: the one with the sample first, then what belongs to it."""
    found = list(columns)
    for column in (text_column, *_CHAT_COLUMNS, _TOKEN_COLUMN):
        if column in found:
            mask = column == _TOKEN_COLUMN and "attention_mask" in found
            return [column, "attention_mask"] if mask else [column]
    raise CalibrationError(
        f"{where} has no column {text_column!r}, 'messages', 'conversations' or 'input_ids'; "
        f"its columns are {_listing(found)}: name the one with the text as text_column"
    )


# Sources ------------------------------------------------------------------------------------------------------------


def _open_source(data: Any, request: _Request) -> _Source:
    if data is None:
        return _python_reference(request.seed)
    if isinstance(data, Path):
        return _open_file(data, request.text_column)
    if isinstance(data, str):
        return _open_named(data, request)
    if _is_hub_object(data):
        return _from_dataset(data, f"the data set passed as {request.argument}", request)
    if isinstance(data, Mapping):
        return _Source(_rows_of_batch(data, request.argument), "token ids")
    if isinstance(data, (list, tuple)):
        return _from_list(data, request)
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        return _from_tensor(torch.as_tensor(data), request.argument)
    raise CalibrationError(f"{request.argument} is {_described(data)}, which is no text; {request.alternatives}")


def _from_list(data: Sequence[Any], request: _Request) -> _Source:
    if not data:
        raise CalibrationError(f"{request.argument} is an empty list; {request.alternatives}")
    first = data[0]
    if _is_message(first):
        return _Source([data], "a chat")
    if isinstance(first, int) or (isinstance(first, Tensor) and first.ndim == 0):
        return _Source([data], "token ids")
    if isinstance(first, str):
        return _Source(data, "a list of texts")
    if isinstance(first, Mapping):
        return _Source(data, "a list of rows")
    return _Source(data, "a list of chats" if _is_chat(first) else "token ids")


def _from_tensor(ids: Tensor, argument: str) -> _Source:
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"{argument} is a tensor of shape {tuple(ids.shape)}; [samples, tokens] was expected")
    return _Source(ids.reshape(-1, ids.shape[-1]), "token ids")


def _rows_of_batch(batch: Mapping[str, Any], argument: str) -> Iterator[dict[str, Any]]:
    """The rows of what a tokenizer returns for one text or several."""
    if _TOKEN_COLUMN not in batch:
        raise CalibrationError(
            f"{argument} is a mapping with the keys {_listing(batch)}; 'input_ids' was expected. To pass rows, "
            "pass a list of mappings"
        )
    columns = {_TOKEN_COLUMN: batch[_TOKEN_COLUMN]}
    if batch.get("attention_mask") is not None:
        columns["attention_mask"] = batch["attention_mask"]
    if _is_flat(columns[_TOKEN_COLUMN]):
        return iter([columns])
    if len({len(column) for column in columns.values()}) > 1:
        raise CalibrationError(f"{argument} has input_ids and an attention_mask of different numbers of samples")
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _is_flat(ids: Any) -> bool:
    """Whether ids belong to one sample."""
    if isinstance(ids, (list, tuple)):
        return bool(ids) and isinstance(ids[0], int)
    return getattr(ids, "ndim", 0) == 1


def _python_reference(seed: int) -> _Source:
    """The language reference that `help()` reads: some 460 kB of English and code, cut into paragraphs.

    Topics are shuffled, since they are sorted by name; paragraphs of a topic stay together. The text differs a little
    between Python versions.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python was installed without pydoc_data, the text autoq calibrates on by default; "
            "pass calib_data: a list of strings or a .txt, .jsonl, .json or .parquet file"
        ) from None
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    texts = (re.sub(r"^\W{3,}$", "", topics[name], flags=re.MULTILINE) for name in names)  # without underlines
    paragraphs = (" ".join(paragraph.split()) for text in texts for paragraph in _paragraphs(text))
    version = ".".join(platform.python_version_tuple()[:2])
    return _Source(
        paragraphs, f"the Python {version} language reference (the offline default: no calib_data was given)"
    )


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


# Files --------------------------------------------------------------------------------------------------------------


def _open_named(name: str, request: _Request) -> _Source:
    """A string is a file when it ends like one or there is one, else the name of a data set."""
    file_like = Path(name).suffix.lower() in _FILE_READERS or (name != "" and _exists(name))
    if file_like and "\n" not in name:
        return _open_file(Path(name), request.text_column)
    match = _DATASET_NAME.fullmatch(name)
    if match is None:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise CalibrationError(
            f"{request.argument} {shown!r} is neither a file nor a data set name; to use the text itself, "
            "pass it in a list"
        )
    known = _DATASET_ALIASES.get(match["path"], _HubDataset(match["path"]))
    return _open_dataset(
        _HubDataset(known.path, match["config"] or known.config, known.split or request.split), request
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or holds a NUL: a text, not a name
        return False


def _open_file(path: Path, text_column: str) -> _Source:
    if path.is_dir():
        raise CalibrationError(f"{path} is a directory; pass a file, or a list of the texts in it")
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        kinds = ", ".join(_FILE_READERS)
        raise CalibrationError(f"the file {path} is of the unknown kind {path.suffix!r}; known are {kinds}")
    if not path.exists():
        raise CalibrationError(f"the file {path} does not exist; check the path (looked in {path.parent.absolute()})")
    return _Source(reader(path, text_column), path.name)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the file {path} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise CalibrationError(f"the file {path} cannot be read: {_reason(error)}") from error


def _read_txt(path: Path, _: str) -> Iterator[str]:
    with _open_text(path) as file:
        text = file.read()
    yield from (paragraph.strip("\n") for paragraph in _paragraphs(text))


def _read_json(path: Path, _: str) -> Iterator[Any]:
    with _open_text(path) as file:
        text = file.read()
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise CalibrationError(f"the file {path} is not valid JSON at {place}: {error.msg}") from error
    if not isinstance(items, list):
        raise CalibrationError(f"the file {path} holds {_described(items)}; a list of samples was expected")
    yield from items


def _read_jsonl(path: Path, _: str) -> Iterator[Any]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"line {number} of {path} is not valid JSON: {error.msg}") from error
            yield item


def _read_parquet(path: Path, text_column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise CalibrationError("reading a .parquet file needs pyarrow; install it with: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _sample_columns(file.schema_arrow.names, text_column, str(path))
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"the file {path} cannot be read as parquet: {_reason(error)}") from error


_FILE_READERS = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# Data sets ----------------------------------------------------------------------------------------------------------


def _is_hub_object(data: Any) -> bool:
    # Who passes an object of `datasets` has imported it; others should not wait for the import.
    datasets = sys.modules.get("datasets")
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return any(isinstance(data, getattr(datasets, name, ())) for name in names)


def _open_dataset(wanted: _HubDataset, request: _Request) -> _Source:
    config = f" ({wanted.config})" if wanted.config else ""
    shown = f"the data set {wanted.path!r}{config}, split {wanted.split!r}"
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"loading {shown} needs the datasets package; install it with: pip install datasets, "
            f"or {request.alternatives}"
        ) from None
    try:
        dataset = load_dataset(wanted.path, wanted.config, split=wanted.split)
    # Whatever goes wrong in the libraries below, the user's way out is the same.
    except Exception as error:
        raise CalibrationError(
            f"{shown}, could not be loaded ({_reason(error)}), and there is no file of that name; "
            f"check the name and the network, or {request.alternatives}"
        ) from None
    return _from_dataset(dataset, shown, request)


def _select_split(dataset: Any, name: str, split: str) -> tuple[Any, str]:
    """A data set without splits, and its name."""
    if not isinstance(dataset, Mapping):
        return dataset, name
    if split not in dataset:
        raise CalibrationError(f"{name} has no split {split!r}; its splits are {_listing(dataset)}: name one as split")
    return dataset[split], f"{name}, split {split!r}"


def _from_dataset(dataset: Any, name: str, request: _Request) -> _Source:
    """The rows of a data set, shuffled, reduced to the columns that are needed."""
    dataset, name = _select_split(dataset, name, request.split)
    seed = request.seed
    if dataset.column_names is not None:  # a stream may not know its columns before it is read
        dataset = dataset.select_columns(_sample_columns(dataset.column_names, request.text_column, name))
    streamed = not hasattr(dataset, "num_rows")
    dataset = dataset.shuffle(seed=seed, **({"buffer_size": _SHUFFLE_BUFFER} if streamed else {}))
    return _Source(dataset, f"{name}, shuffled with seed {seed}")


def _listing(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"


def _described(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
