"""Llamas as GGUF files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from autoq.nn import QuantLinear
from autoq.quantization.weight import QuantizedWeight
from peers import q4


def write(model: LlamaForCausalLM, path: Path) -> None:
    """Writes a model: quantized linears as Q4_1 or, if symmetric, as Q4_0, norms in fp32, all else in bf16."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            data, kind = _quantized(module.quantized_weight(), _heads(name, config))
        elif getattr(module, "weight", None) is not None:
            data, kind = _plain(_for_rope(module.weight.detach(), _heads(name, config)))
        else:
            continue
        writer.add_tensor(f"{names.get_name(name)}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_bytes(path: Path) -> int:
    """Bytes of the weights that a decoded token reads: all but the embeddings."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name != "token_embd.weight")


def same_blocks(one: Path, other: Path) -> bool:
    """Whether two files have the same decoder blocks, bit for bit."""
    found, expected = (_blocks(path) for path in (one, other))
    return found.keys() == expected.keys() and all(
        tensor.tensor_type == expected[name].tensor_type and np.array_equal(tensor.data, expected[name].data)
        for name, tensor in found.items()
    )


def _blocks(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk.")}


def _heads(name: str, config: LlamaConfig) -> int | None:
    """The heads whose rows llama.cpp has in another order, or None where it has not."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.rpartition(".")[2])


def _for_rope(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of queries or keys in llama.cpp's order, which interleaves the two halves of a head."""
    return rows if heads is None else rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _plain(weight: Tensor) -> tuple[np.ndarray, Kind]:
    if weight.ndim == 1:
        return weight.float().numpy(), Kind.F32
    return weight.bfloat16().contiguous().view(torch.uint8).numpy(), Kind.BF16


def _quantized(weight: QuantizedWeight, heads: int | None) -> tuple[np.ndarray, Kind]:
    codes, scales = (_for_rope(part, heads).numpy() for part in (weight.codes, weight.scales))
    zeros = None if weight.zeros is None else _for_rope(weight.zeros, heads).numpy()
    return q4.blocks(codes, scales, zeros), Kind.Q4_0 if zeros is None else Kind.Q4_1
