"""Perplexity and divergence against direct float64 computations, generation against uncached greedy decoding."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from autoq.errors import ConfigError
from autoq.evaluation.divergence import compare, kl_divergence
from autoq.evaluation.perplexity import evaluating, perplexity, token_windows
from autoq.evaluation.speed import greedy_step, measure_generation, model_bytes

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3  # 216 tokens of a byte

# The package exports the function under the name of the module.
perplexity_module = importlib.import_module("autoq.evaluation.perplexity")


class FixedLogits(nn.Module):
    """A model that predicts the same whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(vocab_size=len(logits))
        self.device = logits.device

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class Wrapper(nn.Module):
    """A model that passes everything on to the one it keeps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.device = model.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.fixture
def sharp_llama(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """With a head large enough for predictions far from uniform."""
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(60)
    return tiny_llama


def perturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        other.lm_head.weight[::3].mul_(1.1)
    return other


def direct_log_probabilities(model: nn.Module, ids: list[int], length: int) -> Tensor:
    """Float64 log probabilities `[windows, length, vocabulary]`, sharing no code with autoq."""
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    with torch.no_grad():
        logits = model.double()(torch.tensor(windows)).logits
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def direct_perplexity(log_probabilities: Tensor, ids: list[int]) -> float:
    count, length = log_probabilities.shape[:2]
    losses = [
        -log_probabilities[window, position, ids[window * length + position + 1]].item()
        for window in range(count)
        for position in range(length - 1)
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [2, 30, 108])
def test_perplexity_is_that_of_a_direct_computation(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    result = perplexity(sharp_llama, tiny_tokenizer, TEXT, length)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = direct_perplexity(direct_log_probabilities(sharp_llama, ids, length), ids)
    assert float(result) == result.value == pytest.approx(expected, rel=1e-5)
    assert result.windows == len(TEXT) // length
    assert result.tokens == result.windows * (length - 1)


def test_perplexity_of_uniform_predictions_is_the_vocabulary(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    result = perplexity(FixedLogits(torch.zeros(512)), tiny_tokenizer, TEXT, 16)
    assert result.value == pytest.approx(512, rel=1e-6)


def test_perplexity_does_not_depend_on_batches_chunks_or_the_form_of_the_text(
    sharp_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = perplexity(sharp_llama, tiny_tokenizer, TEXT, 30).value
    path = tmp_path / "text.raw"
    path.write_text(TEXT)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for tokenizer, text, batch_size in ((tiny_tokenizer, path, 1), (None, ids, 3), (None, ids[0], 100)):
        assert perplexity(sharp_llama, tokenizer, text, 30, batch_size=batch_size).value == pytest.approx(expected)
    monkeypatch.setattr(perplexity_module, "_CHUNK_ELEMENTS", 7 * 264)  # rows of 264 logits, 7 at a time, of 29
    assert perplexity(sharp_llama, tiny_tokenizer, TEXT, 30).value == pytest.approx(expected)
    assert perplexity(Wrapper(sharp_llama), tiny_tokenizer, TEXT, 30).value == pytest.approx(expected)


def test_perplexity_of_a_bfloat16_model_is_computed_in_float32(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = sharp_llama.bfloat16()
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = torch.cat([model(window).logits for window in torch.tensor(ids).view(6, 1, 36)])
    assert logits.dtype == torch.bfloat16
    expected = direct_perplexity(logits.double().log_softmax(dim=-1), ids)
    assert perplexity(model, tiny_tokenizer, TEXT, 36).value == pytest.approx(expected, rel=1e-5)


def test_windows(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    windows = token_windows(tiny_llama, tiny_tokenizer, TEXT, 50, None)
    assert windows.shape == (4, 50)
    assert tiny_tokenizer.decode(windows.flatten()) == TEXT[:200]
    assert torch.equal(token_windows(tiny_llama, tiny_tokenizer, TEXT, 50, 3), windows[:3])
    assert token_windows(tiny_llama, tiny_tokenizer, TEXT, None, None).shape == (1, 128)  # the model's context
    unlimited = SimpleNamespace(config=SimpleNamespace())
    assert token_windows(unlimited, None, torch.arange(5000), None, None).shape == (2, 2048)
    long = SimpleNamespace(config=SimpleNamespace(n_positions=4096))
    assert token_windows(long, None, torch.arange(5000), None, None).shape == (2, 2048)


def test_broken_models_have_infinite_or_nan_perplexity(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.full((512,), 2000.0)
    logits[3 : 3 + 256] = 0  # of all bytes
    assert perplexity(FixedLogits(logits), tiny_tokenizer, TEXT, 16).value == math.inf
    assert math.isnan(perplexity(FixedLogits(torch.full((512,), math.nan)), tiny_tokenizer, TEXT, 16).value)


def test_divergence_is_that_of_a_direct_computation(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = perturbed(sharp_llama)
    result = compare(sharp_llama, other, tiny_tokenizer, TEXT, 36, batch_size=4)
    only = kl_divergence(sharp_llama, other, tiny_tokenizer, TEXT, 36)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    log_p = direct_log_probabilities(sharp_llama, ids, 36)
    log_q = direct_log_probabilities(other, ids, 36)
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
    agreement = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double().mean().item()
    assert expected > 0.01
    assert 0.1 < agreement < 0.99
    assert float(result.divergence) == pytest.approx(expected, rel=1e-4)
    assert only.value == pytest.approx(expected, rel=1e-4)
    assert result.divergence.top1_agreement == only.top1_agreement == pytest.approx(agreement)
    assert (result.divergence.windows, result.divergence.positions) == (6, 216)
    assert result.reference.value == pytest.approx(direct_perplexity(log_p, ids), rel=1e-5)
    assert result.model.value == pytest.approx(direct_perplexity(log_q, ids), rel=1e-5)


def test_divergence_of_known_distributions(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """KL is not symmetric: uniform over half of the vocabulary against uniform over all of it is ln 2."""
    half = torch.zeros(512)
    half[256:] = -1e4
    result = kl_divergence(FixedLogits(half), FixedLogits(torch.zeros(512)), tiny_tokenizer, TEXT, 16)
    assert result.value == pytest.approx(math.log(2), rel=1e-6)
    assert kl_divergence(FixedLogits(torch.zeros(512)), FixedLogits(half), tiny_tokenizer, TEXT, 16).value > 1000


def test_divergence_of_a_model_from_itself_is_zero(
    sharp_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = kl_divergence(sharp_llama, copy.deepcopy(sharp_llama), tiny_tokenizer, TEXT, 36)
    assert result.value == 0
    assert result.top1_agreement == 1


def test_divergence_needs_equal_vocabularies(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    models = FixedLogits(torch.zeros(512)), FixedLogits(torch.zeros(513))
    with pytest.raises(ConfigError, match="vocabularies of 512 and 513 tokens"):
        kl_divergence(*models, tiny_tokenizer, TEXT, 16)


def test_evaluating_restores_the_mode_of_every_submodule(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    before = [part.training for part in tiny_llama.modules()]
    during: list[bool] = []

    def fail() -> None:
        with evaluating(tiny_llama):
            during.extend(part.training for part in tiny_llama.modules())
            assert torch.is_inference_mode_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(during)
    assert [part.training for part in tiny_llama.modules()] == before


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("short", {}, "the text has 5 tokens, fewer than one window of 50"),
        ("", {}, "the text has 0 tokens"),
        (TEXT, {"sequence_length": 129}, "sequence_length is 129, but the model's context is 128 tokens"),
        (TEXT, {"sequence_length": 1}, "sequence_length is 1; a window needs at least 2"),
        (TEXT, {"max_windows": 0}, "max_windows is 0"),
        (TEXT, {"batch_size": 0}, "batch_size is 0"),
        (torch.full((60,), 264), {}, "token ids from 264 to 264, but the model's vocabulary has 264"),
        (torch.full((60,), -1), {}, "token ids from -1"),
        (torch.ones(60), {}, "is a torch.float32 tensor"),
        (torch.ones(2, 60, dtype=torch.int64), {}, r"of shape \(2, 60\)"),
        (17, {}, "of type int"),
        (Path("missing.txt"), {}, "missing.txt does not exist"),
        (Path("."), {}, "is not a file"),
    ],
)
def test_wrong_texts(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Any,
    options: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_llama, tiny_tokenizer, text, **{"sequence_length": 50, **options})


def test_wrong_files_and_models(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9" * 60)
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        perplexity(tiny_llama, tiny_tokenizer, path, 50)
    with pytest.raises(ConfigError, match=r"pass it as a pathlib\.Path"):
        perplexity(tiny_llama, tiny_tokenizer, str(path), 128)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        perplexity(tiny_llama, None, TEXT, 50)
    no_module = SimpleNamespace(config=tiny_llama.config, device=tiny_llama.device)
    with pytest.raises(ConfigError, match="of type SimpleNamespace; a torch module"):
        perplexity(no_module, tiny_tokenizer, TEXT, 50)


def test_cached_steps_write_what_uncached_decoding_writes(sharp_llama: LlamaForCausalLM) -> None:
    prompt = torch.arange(20).view(2, 10)
    uncached = prompt
    with torch.inference_mode():
        for _ in range(8):
            following = sharp_llama(uncached, use_cache=False).logits[:, -1:].argmax(dim=-1)
            uncached = torch.cat([uncached, following], dim=1)
        for model in (sharp_llama, Wrapper(sharp_llama)):
            written, ids, cache = prompt, prompt, None
            for _ in range(8):
                ids, cache = greedy_step(model, ids, cache)
                written = torch.cat([written, ids], dim=1)
            assert torch.equal(written, uncached)
            assert cache.get_seq_length() == 17


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper])
def test_measure_generation(tiny_llama: LlamaForCausalLM, wrap: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    result = measure_generation(wrap(tiny_llama), prompt_tokens=12, new_tokens=6, batch_size=2, repeats=3)
    # Warm-up and repeats, and the head on no more than the last position.
    assert shapes == [(2, 1, 32)] * (4 + 3 * 6)
    assert result.prefill_seconds > 0
    assert result.tokens_per_second == pytest.approx(2000 / result.decode_milliseconds)
    assert result.prefill_tokens_per_second == pytest.approx(24 / result.prefill_seconds)
    assert result.peak_device_bytes is None
    assert result.peak_process_bytes is None or result.peak_process_bytes > 2**24  # torch alone takes more


def test_measure_generation_times_prefill_and_steps_apart(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances by the tokens the model has read, the times are counts of tokens."""
    now = 0.0

    def advance(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal now
        now += inputs[0].shape[1]

    tiny_llama.register_forward_pre_hook(advance)
    monkeypatch.setattr("autoq.evaluation.speed.time.perf_counter", lambda: now)
    result = measure_generation(tiny_llama, prompt_tokens=12, new_tokens=3, repeats=1)
    assert result.prefill_seconds == 12
    assert result.decode_milliseconds == 1000
    assert result.tokens_per_second == 1


def test_measure_generation_checks_its_counts(tiny_llama: LlamaForCausalLM) -> None:
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch_size", 1), ("repeats", 1)):
        with pytest.raises(ConfigError, match=f"{name} is {least - 1}; .* at least {least}"):
            measure_generation(tiny_llama, **{name: least - 1})
    with pytest.raises(ConfigError, match="128 prompt tokens and 64 new tokens exceed the model's context of 128"):
        measure_generation(tiny_llama)


def test_model_bytes_counts_tied_weights_once() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(10, 4)  # 160 bytes
    model.head = nn.Linear(4, 10, bias=False)
    assert model_bytes(model) == 320
    model.head.weight = model.embedding.weight
    assert model_bytes(model) == 160
    model.head.weight = nn.Parameter(model.embedding.weight.data)  # another object on the same memory
    assert model_bytes(model) == 160
    model.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
    assert model_bytes(model) == 163
    assert model_bytes(model.to("meta")) == 323  # moving makes two parameters of the shared memory
