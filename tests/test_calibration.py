"""Calibration data of every accepted kind, packing and truncation, and the errors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoq.errors import CalibrationError
from autoq.quantization import calibration as calibration_module
from autoq.quantization.calibration import CalibrationSet, load_calibration

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CHAT_TEXT = "[user]hi[assistant]hello"


def decoded(tokenizer: PreTrainedTokenizerFast, calibration: CalibrationSet) -> list[str]:
    return [str(tokenizer.decode(sample, skip_special_tokens=False)) for sample in calibration.samples]


def samples(calibration: CalibrationSet) -> list[list[int]]:
    for sample in calibration.samples:
        assert sample.dtype == torch.int64
        assert sample.ndim == 1
    return [sample.tolist() for sample in calibration.samples]


def whole(tokenizer: PreTrainedTokenizerFast, data: Any, **options: Any) -> list[str]:
    """The texts of the samples, unpacked, without the BOS that starts each text."""
    texts = decoded(tokenizer, load_calibration(tokenizer, data, packing=False, **options))
    return [text.removeprefix("<s>") for text in texts]


def test_packing_keeps_samples_that_are_a_window_each(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{index:03d} " + "x" * 28 for index in range(128)]
    calibration = load_calibration(tiny_tokenizer, texts, max_seq_len=32)
    assert decoded(tiny_tokenizer, calibration) == texts
    assert calibration.tokens == 128 * 32
    assert calibration.describe() == "calibration: 128 samples, 4,096 tokens, from a list of texts"


def test_packing_joins_texts_and_drops_the_remainder(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    calibration = load_calibration(tiny_tokenizer, ["abc", "", " \n", "defghijk", "lm"], max_seq_len=4)
    assert decoded(tiny_tokenizer, calibration) == ["abcd", "efgh", "ijkl"]


def test_packing_keeps_a_remainder_that_is_all_there_is(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    calibration = load_calibration(tiny_tokenizer, ["ab", "c"], max_seq_len=8)
    assert decoded(tiny_tokenizer, calibration) == ["abc"]
    assert calibration.describe().startswith("calibration: 1 sample, 3 tokens")


def test_packing_stops_reading_when_it_has_enough(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    # The third item would be an error if it were read.
    calibration = load_calibration(tiny_tokenizer, ["abcd", "efgh", 3.5], max_seq_len=3, max_samples=2)
    assert decoded(tiny_tokenizer, calibration) == ["abc", "def"]


def test_without_packing_texts_are_truncated_and_start_with_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abcdefgh", "", "ij", "kl", "never read"]
    calibration = load_calibration(tiny_tokenizer, texts, packing=False, max_seq_len=4, max_samples=3)
    assert decoded(tiny_tokenizer, calibration) == ["<s>abc", "<s>ij", "<s>kl"]


def test_text_longer_than_the_context_gives_no_warning(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_tokenizer.model_max_length = 4
    load_calibration(tiny_tokenizer, ["abcdefgh"], max_seq_len=4)
    assert not caplog.records


# Kinds of data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\nline\n\n \n\ntwo\n"),
        ("a.txt", "\ufeffone\r\nline\r\n\r\ntwo"),
        ("a.json", json.dumps(["one\nline", "two"])),
        ("a.json", json.dumps([{"text": "one\nline"}, {"text": None}, {"text": "two"}])),
        ("A.JSONL", '"one\\nline"\n\n"two"\n'),
        ("a.jsonl", '{"text": "one\\nline", "id": 1}\n{"text": "two", "id": 2}'),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_text_files(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: str, kind: type
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert whole(tiny_tokenizer, kind(path)) == ["one\nline", "two"]
    assert load_calibration(tiny_tokenizer, path).source == name


def test_parquet(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two"]}), path)
    assert whole(tiny_tokenizer, path, text_column="body") == ["one", "two"]
    with pytest.raises(CalibrationError, match=r"no column 'text'.*its columns are 'id', 'body'"):
        load_calibration(tiny_tokenizer, path)
    path.write_bytes(b"not parquet at all")
    with pytest.raises(CalibrationError, match="cannot be read as parquet"):
        load_calibration(tiny_tokenizer, path)


@pytest.mark.parametrize(
    "data",
    [
        CHAT,
        [CHAT],
        [{"messages": CHAT}],
        [{"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}],
    ],
)
def test_chats(tiny_tokenizer: PreTrainedTokenizerFast, data: Any) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    calibration = load_calibration(tiny_tokenizer, data, packing=False)
    # No BOS beside what the template writes.
    assert decoded(tiny_tokenizer, calibration) == [CHAT_TEXT]


def test_chats_from_jsonl(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    assert whole(tiny_tokenizer, path) == [CHAT_TEXT, CHAT_TEXT]


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32).numpy(),
        [torch.tensor([1, 2, 3]), torch.tensor([[4, 5, 6]])],
        [[1, 2, 3], [], (4, 5, 6)],
        {"input_ids": [[1, 2, 3], [4, 5, 6]]},
        {"input_ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]]), "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 0]]},
        [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 9, 6], "attention_mask": [1, 1, 0, 1]}],
    ],
)
def test_tokens(data: Any) -> None:
    assert samples(load_calibration(None, data, packing=False)) == [[1, 2, 3], [4, 5, 6]]
    assert samples(load_calibration(None, data, max_seq_len=2)) == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("data", [[1, 2, 3], torch.tensor([1, 2, 3]), {"input_ids": [1, 2, 3]}])
def test_tokens_of_one_sample(data: Any) -> None:
    assert samples(load_calibration(None, data, packing=False)) == [[1, 2, 3]]


def test_batch_of_a_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tiny_tokenizer(["abc", "d"], padding=True, return_tensors="pt")
    assert whole(tiny_tokenizer, batch) == ["abc", "d"]


def test_default_needs_no_data_and_is_the_same_each_time(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"max_samples": 8, "max_seq_len": 200}
    first, second = (load_calibration(tiny_tokenizer, **options) for _ in range(2))
    assert samples(first) == samples(second)
    assert samples(first) != samples(load_calibration(tiny_tokenizer, **options, seed=1))
    assert (len(first.samples), first.tokens) == (8, 1600)
    assert "Python" in first.source
    assert "offline default" in first.source
    text = "".join(decoded(tiny_tokenizer, first))
    assert "\n" not in text
    assert "  " not in text
    assert " the " in text


def test_default_is_large_enough_for_the_default_setting(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    # 128 samples of 512 tokens, of the 5 bytes a token has in a large vocabulary.
    assert load_calibration(tiny_tokenizer, max_samples=128, max_seq_len=512 * 5).tokens == 128 * 512 * 5


# Data sets ----------------------------------------------------------------------------------------------------------


def test_dataset_is_shuffled_under_the_seed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"{index:03d}" for index in range(100)]
    dataset = datasets.Dataset.from_dict({"text": texts, "other": texts})
    first = whole(tiny_tokenizer, dataset, max_samples=50)
    assert first == whole(tiny_tokenizer, dataset, max_samples=50)
    assert first != whole(tiny_tokenizer, dataset, max_samples=50, seed=1)
    assert first != texts[:50]
    assert set(first) < set(texts)
    stream = dataset.to_iterable_dataset()
    assert set(whole(tiny_tokenizer, stream)) == set(texts)
    assert load_calibration(tiny_tokenizer, dataset).source == "the data set passed as calib_data, shuffled with seed 0"


def test_dataset_dict_and_columns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    tiny_tokenizer.chat_template = TEMPLATE
    splits = datasets.DatasetDict(
        {"test": datasets.Dataset.from_dict({"messages": [CHAT]}), "dev": datasets.Dataset.from_dict({"body": ["b"]})}
    )
    assert whole(tiny_tokenizer, splits, split="test") == [CHAT_TEXT]
    assert whole(tiny_tokenizer, splits, split="dev", text_column="body") == ["b"]
    with pytest.raises(CalibrationError, match="no split 'train'; its splits are 'test', 'dev'"):
        load_calibration(tiny_tokenizer, splits)
    with pytest.raises(CalibrationError, match=r"split 'dev' has no column 'text'.*its columns are 'body'"):
        load_calibration(tiny_tokenizer, splits, split="dev")


@pytest.mark.parametrize(
    ("name", "request_made"),
    [
        ("pileval", ("mit-han-lab/pile-val-backup", None, "validation")),
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext:wikitext-103-raw-v1", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
        ("org/name", ("org/name", None, "train")),
        ("org/name:config", ("org/name", "config", "train")),
    ],
)
def test_dataset_names(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, name: str, request_made: tuple[str, ...]
) -> None:
    datasets = pytest.importorskip("datasets")
    requests = []

    def load_dataset(path: str, config: str | None, *, split: str) -> Any:
        requests.append((path, config, split))
        return datasets.Dataset.from_dict({"text": ["abc"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert whole(tiny_tokenizer, name) == ["abc"]
    assert requests == [request_made]


def test_dataset_that_cannot_be_loaded(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(tiny_tokenizer, "pileval")
    message = str(caught.value)
    assert "'mit-han-lab/pile-val-backup', split 'validation'" in message
    assert "(ConnectionError: Couldn't reach the Hub)" in message
    assert ".jsonl" in message
    assert "leave calib_data out" in message
    assert caught.value.__suppress_context__


def test_dataset_name_without_the_datasets_package(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="needs the datasets package; install it"):
        load_calibration(tiny_tokenizer, "pileval")
    assert whole(tiny_tokenizer, ["abc"]) == ["abc"]


def test_module_needs_no_optional_package(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("datasets", "pyarrow", "pydoc_data.topics"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    spec = importlib.util.spec_from_file_location("fresh_calibration", calibration_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    assert fresh.load_calibration(tiny_tokenizer, ["abc"]).tokens == 3
    with pytest.raises(CalibrationError, match="installed without pydoc_data"):
        fresh.load_calibration(tiny_tokenizer)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calib_data is an empty list"),
        (["", "  "], "a list of texts holds no tokens"),
        (torch.empty(0, 4, dtype=torch.int64), "token ids holds no tokens"),
        (3.5, "calib_data is a value of type float"),
        ({"a", "b"}, "calib_data is a value of type set"),
        (["a", 3.5], "item 1 of a list of texts holds torch.float32 numbers"),
        (["a", None], "item 1 of a list of texts is a value of type NoneType"),
        ([["a", "b"]], "item 0 of token ids is a value of type list"),
        (["a\ud800b"], "not valid Unicode"),
        ([[1.0, 2.0]], "token ids are integers"),
        (torch.ones(2, 2), "token ids are integers"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"shape \(2, 2, 2\)"),
        ([[1, 2], [3, -1]], "item 1 of token ids holds the token id -1"),
        ([[1, 2], [3, 259]], "holds the token id 259, but the vocabulary has 259 tokens"),
        ([[10**30]], "item 0 of token ids"),
        ({"text": ["a"]}, "mapping with the keys 'text'"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, "different numbers of samples"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "has 2 tokens but 1 entries in its attention_mask"),
        ([{"body": "a"}], "item 0 of a list of rows has no column 'text'.*its columns are 'body'"),
        ([{"text": {"a": 1}}], "column 'text' of item 0 of a list of rows holds a mapping"),
        ([CHAT], "item 0 of a list of chats is a chat, but the tokenizer has no chat template"),
        ("some text\nmore text", "neither a file nor a data set name.*in a list"),
        ("x" * 5000 + " y", "neither a file nor a data set name"),
        ("", "neither a file nor a data set name"),
    ],
)
def test_wrong_data(tiny_tokenizer: PreTrainedTokenizerFast, data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tiny_tokenizer, data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no tokens"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.jsonl", b'"fine"\n"caf\xe9"\n', "is not UTF-8 text"),
        ("a.jsonl", b'"fine"\n\n{"text": \n', "line 3 of .* is not valid JSON"),
        ("a.jsonl", b'"fine"\n17\n', r"item 1 of a.jsonl has the shape \(\)"),
        ("a.json", b'["fine",\n oops]', "is not valid JSON at line 2, column 2"),
        ("a.json", b'{"text": "a"}', "holds a value of type dict; a list of samples was expected"),
        ("a.csv", b"text\na\n", "unknown kind '.csv'; known are .txt, .json, .jsonl, .parquet"),
    ],
)
def test_wrong_files(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tiny_tokenizer, str(path))


def test_paths_that_are_no_files(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for kind in (str, Path):
        with pytest.raises(CalibrationError, match="does not exist"):
            load_calibration(tiny_tokenizer, kind(tmp_path / "missing.txt"))
        with pytest.raises(CalibrationError, match="is a directory"):
            load_calibration(tiny_tokenizer, kind(tmp_path))


def test_chat_the_template_refuses(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"cannot render item 0 of a chat: .*roles must alternate"):
        load_calibration(tiny_tokenizer, CHAT)
    with pytest.raises(CalibrationError, match=r"a message of item 0 .* has the keys 'role'; 'role' and 'content'"):
        load_calibration(tiny_tokenizer, [[{"role": "user"}]])


def test_wrong_settings(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match="max_samples is 0"):
        load_calibration(tiny_tokenizer, ["a"], max_samples=0)
    with pytest.raises(CalibrationError, match="max_seq_len is 0"):
        load_calibration(tiny_tokenizer, ["a"], max_seq_len=0)
    with pytest.raises(CalibrationError, match=r"eval_data: a list of texts holds no tokens.*leave eval_data out"):
        load_calibration(tiny_tokenizer, [""], argument="eval_data")
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        load_calibration(None, ["a"])
    with pytest.raises(CalibrationError, match="the vocabulary has 50 tokens"):
        load_calibration(tiny_tokenizer, ["a"], vocab_size=50)
