"""A small model of every family and of every variant of its config that changes what may be folded, and ways to make
quantized ones of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from autoq import AutoQForCausalLM

VOCABULARY = 264


@dataclass(frozen=True)
class Variant:
    """config: of a model with two blocks, 64 wide; unscaled: the linears of a block that no exact group holds."""

    name: str
    config: PretrainedConfig
    unscaled: frozenset[str] = frozenset()

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A float32 model in evaluation mode, all of whose weights (norms and biases too) are random."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.3, 1.7)
                else:
                    parameter.normal_(std=0.15)
        return model


def _llama(kind: type[PretrainedConfig] = LlamaConfig, **changes: object) -> PretrainedConfig:
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    }  # fmt: skip
    return kind(**{**settings, **changes})


def _opt(**changes: object) -> PretrainedConfig:
    settings = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "word_embed_proj_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 128}  # fmt: skip
    return OPTConfig(**{**settings, **changes})


def _bloom(**changes: object) -> PretrainedConfig:
    return BloomConfig(**{"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, **changes})


def _mpt(**attention: object) -> PretrainedConfig:
    return MptConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=VOCABULARY,
        attn_config={"alibi": True, **attention},
    )


def _falcon(**changes: object) -> PretrainedConfig:
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
                "alibi": False, "bias": False, "new_decoder_architecture": False, "multi_query": False,
                "parallel_attn": True}  # fmt: skip
    return FalconConfig(**{**settings, **changes})


def _gptj(**changes: object) -> PretrainedConfig:
    return GPTJConfig(**{"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128,
                         "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, **changes})  # fmt: skip


_OPT_NORM_LINEARS = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"})
_BLOOM_UNSCALED = frozenset({"mlp.dense_4h_to_h"})
_FALCON_UNSCALED = frozenset({"mlp.dense_4h_to_h"})

VARIANTS = (
    Variant("llama", _llama()),
    Variant("llama-gqa", _llama(num_key_value_heads=2)),
    Variant("llama-biases", _llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    Variant("llama-head-dim", _llama(num_key_value_heads=2, head_dim=32)),
    Variant("llama-tied", _llama(tie_word_embeddings=True)),
    Variant("mistral", _llama(MistralConfig, num_key_value_heads=2)),
    Variant("qwen2", _llama(Qwen2Config, num_key_value_heads=2)),
    Variant("qwen3", _llama(Qwen3Config, num_key_value_heads=2)),
    Variant("opt", _opt()),
    Variant("opt-gelu", _opt(activation_function="gelu"), frozenset({"fc2"})),
    Variant("opt-post-norm", _opt(do_layer_norm_before=False, word_embed_proj_dim=32), _OPT_NORM_LINEARS),
    Variant("opt-plain-norm", _opt(layer_norm_elementwise_affine=False), _OPT_NORM_LINEARS),
    Variant("opt-no-bias", _opt(enable_bias=False)),
    Variant("bloom", _bloom(), _BLOOM_UNSCALED),
    Variant(
        "bloom-norm-residual",
        _bloom(apply_residual_connection_post_layernorm=True),
        _BLOOM_UNSCALED | {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
    ),
    Variant("mpt", _mpt(), frozenset({"ffn.down_proj"})),
    Variant("mpt-clip", _mpt(clip_qkv=0.5), frozenset({"ffn.down_proj", "attn.out_proj"})),
    Variant("falcon-sequential", _falcon(parallel_attn=False, alibi=True, bias=True), _FALCON_UNSCALED),
    Variant("falcon-multi-query", _falcon(multi_query=True), _FALCON_UNSCALED),
    Variant("falcon-per-head", _falcon(), _FALCON_UNSCALED),
    Variant("falcon-two-norms", _falcon(new_decoder_architecture=True, num_kv_heads=2), _FALCON_UNSCALED),
    Variant(
        "falcon-new-one-norm",
        _falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        _FALCON_UNSCALED,
    ),
    Variant("gptj", _gptj(), frozenset({"mlp.fc_out"})),
)

# One of each, for tests that take longer.
FAMILIES = tuple(
    variant
    for variant in VARIANTS
    if variant.name in {"llama-gqa", "opt", "bloom", "mpt", "falcon-multi-query", "gptj"}
)


def samples(count: int = 12, length: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY, (count, length), generator=generator))


def quantized(
    variant: Variant, *, dtype: torch.dtype = torch.float32, calib: Any = None, **settings: Any
) -> AutoQForCausalLM:
    model = AutoQForCausalLM(variant.model().to(dtype))
    model.quantize(
        None, {"bits": 4, "group_size": 32, **settings}, calib or samples(), max_calib_seq_len=32, progress=False
    )
    return model


def variant(name: str) -> Variant:
    return next(entry for entry in VARIANTS if entry.name == name)
