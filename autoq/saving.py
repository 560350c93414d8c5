"""Writes a quantized model as a checkpoint that AWQ engines read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from autoq._version import __version__
from autoq.checkpoint import CONFIG, REPORT, write_checkpoint
from autoq.config import EMBEDDINGS, LM_HEAD, QuantConfig
from autoq.errors import ConfigError
from autoq.formats import get_format
from autoq.nn import QuantModule, shares_head
from autoq.nn.spread import in_memory, is_offloaded
from autoq.packed import PackedWeight
from autoq.placement import tied_names
from autoq.quantization.report import QuantizationReport

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

_MODEL_CARD = """---
library_name: autoq
tags:
- awq
---

Quantized to {bits} with AWQ (group size {group_size}, {ranges}), in the `{version}` format.
{notes}
```python
from autoq import AutoQForCausalLM

model = AutoQForCausalLM.from_quantized("path/to/this/directory")
```
"""


def save_model(
    model: PreTrainedModel,
    config: QuantConfig,
    directory: Path,
    shard_size: int | str | None = None,
    report: QuantizationReport | None = None,
) -> None:
    """Writes safetensors, config.json, generation_config.json, a model card and the report; all of it or nothing.

    shard_size: the most bytes a shard holds, as a number or with a unit ("5GB", "500MiB"), which are in memory while it
        is written. None: 5 GB, but 500 MB of a model that is on the disk.
    Raises CheckpointError if the weights are not in memory or the directory cannot be used.
    """
    if shard_size is None:
        shard_size = "500MB" if is_offloaded(model) else "5GB"
    values = _config_dict(model.config, config)
    if shares_head(model):
        values["tie_word_embeddings"] = True
    documents = {CONFIG: _to_json(values)}
    if model.can_generate():
        documents["generation_config.json"] = model.generation_config.to_json_string()
    if report is not None:
        documents[REPORT] = _to_json(report.to_dict())
    if _may_write_card(directory / "README.md"):
        documents["README.md"] = _model_card(config, report)
    write_checkpoint(directory, _tensors(model, config), documents, _bytes(shard_size))


def _may_write_card(path: Path) -> bool:
    """Whether there is no model card, or one written here for an earlier checkpoint."""
    return not path.is_file() or path.read_text(encoding="utf-8", errors="replace").startswith(_MODEL_CARD[:40])


def _to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _tensors(model: PreTrainedModel, config: QuantConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, packed one linear at a time; what is on the disk is fetched as it is written."""
    saved: dict[int, str] = {}
    tied = tied_names(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantModule) and leaf in PackedWeight._fields:
            embeddings = module is model.get_input_embeddings()
            shared = owner == LM_HEAD and shares_head(model)  # and saved as the embeddings
            if leaf == PackedWeight._fields[0] and not shared:
                layout = get_format(config.version_for(EMBEDDINGS if embeddings else owner))
                with in_memory(module, owner):
                    packed = layout.pack(module.quantized_weight())
                yield from ((f"{owner}.{leaf}", part) for leaf, part in packed.items())
        # A tied tensor is saved once, under its first name; loading ties it again. On the disk, every name has its own.
        elif saved.setdefault(id(tensor), name) == name and not (tensor.is_meta and name in tied):
            with in_memory(module, owner):
                tensor = module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)
            yield name, tensor


def _config_dict(config: PretrainedConfig, quant_config: QuantConfig) -> dict[str, Any]:
    """config.json: everything spelled out, since defaults differ between the versions that read it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
    values["quantization_config"] = {**quant_config.to_dict(), "autoq_version": __version__}
    # What transformers 4 and the engines built on it call the same things.
    if "dtype" in values:
        values.setdefault("torch_dtype", values["dtype"])
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            values.setdefault("rope_scaling", scaling)
    return values


def _model_card(config: QuantConfig, report: QuantizationReport | None) -> str:
    notes = ""
    if report is not None and report.held_out is not None:
        notes += f"\nOn {report.held_out}.\n"
    if report is not None:
        notes += f"\n`{REPORT}` says what became of each linear.\n"
    if config.scale_activations:
        notes += "\nIt contains scaled activations, which vLLM and SGLang cannot load.\n"
    if config.lm_head_bits is not None:
        notes += f"\nIts output head has {config.lm_head_bits} bits, which other engines cannot load.\n"
    if config.embedding_bits is not None:
        notes += f"\nIts embeddings have {config.embedding_bits} bits, which other engines cannot load.\n"
    if config.module_group_sizes:
        notes += (
            "\nSome linears have a smaller group size (see config.json); engines with one group size cannot load it.\n"
        )
    if config.version != "gemm":
        notes += "\nThis format is autoq's own; other engines cannot load it.\n"
    widths = sorted({config.bits, *config.module_bits.values()})
    if report is not None:
        found = {line.bits for line in report.quantized if line.bits is not None and line.name != LM_HEAD}
        widths = sorted(found) or widths
    bits = f"{', '.join(map(str, widths[:-1]))} or {widths[-1]} bits" if len(widths) > 1 else f"{widths[0]} bits"
    ranges = "zero points" if config.zero_point else "symmetric"
    return _MODEL_CARD.format(
        bits=bits, group_size=config.group_size, ranges=ranges, version=config.version, notes=notes
    )


def _bytes(size: int | str) -> int:
    if type(size) is int and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?", str(size).strip().upper())
    if isinstance(size, int) or match is None or float(match[1]) <= 0:
        raise ConfigError(f"shard_size is {size!r}; it should be a number of bytes or a string such as '5GB'")
    return int(float(match[1]) * _UNITS[match[2]])
