"""The files that the engines load, all from one random model, and the answers that they should give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from shapes import random_model, round_to_nearest
from transformers import LlamaConfig

from autoq import QuantConfig
from autoq.quantization.weight import dequantize, quantize
from peers.model import random_tokens

try:
    from peers import gguf_files
except ImportError:
    gguf_files = None  # type: ignore[assignment]

_GROUP = 128
# The quantized models, by the name of their files.
_CONFIGS = {
    "asymmetric": QuantConfig(group_size=_GROUP),
    "symmetric": QuantConfig(group_size=_GROUP, zero_point=False),
    "asymmetric_head8": QuantConfig(group_size=_GROUP, lm_head_bits=8),
    "asymmetric_head4": QuantConfig(group_size=_GROUP, lm_head_bits=4),
    "3bit_head4": QuantConfig(group_size=_GROUP, bits=3, lm_head_bits=4),
}
_IN_GGUF = ("asymmetric", "symmetric", "bf16")
_PROMPT = 16  # tokens of which the reference logits are kept
_CHECKED_ROWS = 64  # rows of activations of which the reference product is kept
_OUTLIERS = 64  # one channel in so many is an outlier, 30 times as large


class Prepare:
    """Writes models of well-known shapes, and single weights."""

    def versions(self) -> dict[str, str]:
        return {}

    def can_write_gguf(self) -> bool:
        return gguf_files is not None

    def model(self, shape: str, layers: int | None, folder: str, kind: str) -> dict[str, int]:
        """Writes `kind`, a transformers checkpoint, `kind.gguf` and `kind.npz`, the logits it should give.

        kind: one of those above, quantized by round to nearest in groups of 128, or `bf16`, as it is. Only for
            `asymmetric`, `symmetric` and `bf16` there is a GGUF; it has the same codes and scales, as Q4_1 and Q4_0,
            with embeddings and head in bf16.
        Returns the `cache_bytes` of a token.
        """
        model = random_model(shape, torch.bfloat16, layers)
        target = Path(folder) / kind
        if kind == "bf16":
            model.save_pretrained(target)
        else:
            round_to_nearest(model, _CONFIGS[kind]).save_quantized(target)
        if gguf_files is not None and kind in _IN_GGUF:
            gguf_files.write(model, target.with_suffix(".gguf"))
        if kind != "bf16":
            model.float()  # the reference is exact: quantized weights are multiplied as they are, in fp32
        tokens = random_tokens(_PROMPT, model.config.vocab_size)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].float().numpy()
        np.savez(target.with_suffix(".npz"), tokens=tokens, logits=logits)
        return {"cache_bytes": _cache_bytes(model.config)}

    def gguf(self, path: str, same_as: str | None = None) -> int:
        """Bytes of a GGUF file's weights that a decoded token reads.

        same_as: a file that must have the same decoder blocks.
        """
        if same_as is not None and not gguf_files.same_blocks(Path(path), Path(same_as)):
            raise ValueError(f"llama.cpp's quantizer changed the blocks of {Path(path).name}")
        return gguf_files.weight_bytes(Path(path))

    def weight(self, in_features: int, out_features: int, rows: int, folder: str) -> None:
        """Writes a gaussian weight, quantized with zeros and without, activations, and their float64 products."""
        target = Path(folder)
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
        gaussian = torch.randn(rows, in_features, generator=generator)
        outliers = gaussian.clone()
        outliers[:, torch.randperm(in_features, generator=generator)[: in_features // _OUTLIERS]] *= 30
        # Values that bf16 holds, so that every kernel gets the same ones.
        activations = {"gaussian": gaussian.bfloat16().float(), "outliers": outliers.bfloat16().float()}
        for name, x in activations.items():
            np.save(target / f"{name}.npy", x.numpy())
        for kind in ("asymmetric", "symmetric"):
            weight = quantize(dense, 4, _GROUP, zero_point=kind == "asymmetric")
            parts = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.explicit_zeros()}
            for part, values in parts.items():
                np.save(target / f"{kind}_{part}.npy", values.numpy())
            exact = dequantize(weight, torch.float64).T
            for name, x in activations.items():
                np.save(target / f"{kind}_{name}.npy", (x[:_CHECKED_ROWS].double() @ exact).numpy())


def _cache_bytes(config: LlamaConfig) -> int:
    """Bytes of a token's keys and values, of two bytes each."""
    head = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
