"""Fixtures shared by the tests: a tokenizer and models small enough to build anew for every test, all offline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operators import CAPABILITIES, EXTENSION
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test draws the same numbers whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each set of kernels."""
    if EXTENSION is None:
        yield request.param
        return
    before = EXTENSION.cpu_capability()
    EXTENSION.set_cpu_capability(request.param)
    yield request.param
    EXTENSION.set_cpu_capability(before)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (ids from 3), `<s>` (id 1) before a text when special tokens are asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL_TOKENS | {symbol: len(SPECIAL_TOKENS) + i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama in eval mode: 2 blocks, 32 wide, grouped-query attention, context 128, vocabulary 264."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
