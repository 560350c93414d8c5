"""The class users meet: load, quantize, save, load again, generate."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from autoq.architectures import architecture_of
from autoq.config import QuantConfig
from autoq.errors import ConfigError
from autoq.loading import DeviceMap, find_checkpoint, load_quantized
from autoq.quantization.calibration import load_calibration
from autoq.quantization.pipeline import quantize_model
from autoq.quantization.report import QuantizationReport
from autoq.saving import save_model

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
_AUTOAWQ_OPTIONS = (
    "batch_size", "exllama_config", "max_seq_len", "safetensors", "trust_remote_code", "use_cache_offload",
    "use_exllama", "use_exllama_v2", "use_ipex", "use_qbits",
)  # fmt: skip


class AutoQForCausalLM(nn.Module):
    """A causal language model of transformers, to be quantized or quantized already.

    Made by `from_pretrained` or `from_quantized`. It is called and generates like the transformers model it wraps,
    which is its attribute `model`; attributes it does not have itself, such as `config`, are that model's.
    """

    model: Any  # a PreTrainedModel, most of whose methods have no types

    def __init__(self, model: PreTrainedModel, quant_config: QuantConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.quant_config = quant_config
        self.report: QuantizationReport | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet
                raise
            return getattr(self.model, name)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        *,
        torch_dtype: torch.dtype | str = "auto",
        device_map: DeviceMap | None = None,
        **kwargs: Any,
    ) -> AutoQForCausalLM:
        """Loads a model in full precision, to be quantized.

        model_path: a directory or a hub name; torch_dtype: "auto" is the checkpoint's own.
        Other keywords go to transformers' `from_pretrained`.
        Raises ArchitectureError if the family is not known, so that nothing is downloaded or loaded for nothing.
        """
        for name in ("safetensors", "use_cache", "low_cpu_mem_usage"):  # of AutoAWQ's examples
            kwargs.pop(name, None)
        config = AutoConfig.from_pretrained(
            model_path, **{name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
        )
        architecture_of(config)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(f"{model_path} is quantized already; load it with AutoQForCausalLM.from_quantized")
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch_dtype, device_map=device_map, **kwargs)
        return cls(model.eval())

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        *,
        device_map: DeviceMap | None = "auto",
        torch_dtype: torch.dtype | str = "auto",
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        fuse_layers: bool = False,
        **hub_options: Any,
    ) -> AutoQForCausalLM:
        """Loads a quantized checkpoint: one of autoq's, or an AWQ checkpoint in the GEMM format.

        quant_path: a directory or a hub name.
        device_map: "auto", "balanced", "sequential", a device, or a dict from module names to devices ("disk" among
            them, which keeps the weights in `offload_folder`); max_memory: the bytes each device may hold.
        torch_dtype: of activations and unquantized weights; "auto" is the checkpoint's own.
        fuse_layers: this version runs every model unfused, with the same tokens; True is accepted and says so.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`. Options AutoAWQ had for its backends are
            accepted and ignored with a warning.

        Raises CheckpointError when the checkpoint is incomplete, damaged, unsafe to read or not quantized.
        """
        ignored = sorted(name for name in hub_options if name in _AUTOAWQ_OPTIONS)
        if fuse_layers:
            ignored.append("fuse_layers=True")
        if ignored:
            warnings.warn(f"ignored, as the model runs the same without: {', '.join(ignored)}", stacklevel=2)
        hub = _take_hub_options(hub_options, "from_quantized")
        model, quant_config = load_quantized(
            find_checkpoint(quant_path, **hub),
            device_map=device_map,
            torch_dtype=torch_dtype,
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        return cls(model, quant_config)

    def quantize(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quant_config: Mapping[str, Any] | QuantConfig | None = None,
        calib_data: Any = None,
        *,
        split: str = "train",
        text_column: str = "text",
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        packing: bool = True,
        seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> QuantizationReport:
        """Quantizes the linears of the decoder blocks, in place, with AWQ.

        tokenizer: of this model; not needed if `calib_data` is token tensors.
        quant_config: a QuantConfig or a dict such as `{"bits": 4, "group_size": 128, "zero_point": True}`; AutoAWQ's
            `w_bit` and `q_group_size` are understood. Its settings may also be given as keywords here.
        calib_data: a list of strings, chats or token tensors; the path of a .txt, .json, .jsonl or parquet file; a
            `datasets` name or dataset. None: English text that ships with Python.
        split, text_column: which part of a dataset to use.
        packing: True joins the samples and cuts them into windows of `max_calib_seq_len`; False truncates each.
        Returns the report, which is kept as `report` too.

        Raises ConfigError, CalibrationError, ArchitectureError or QuantizationError, each a sentence.
        """
        if self.quant_config is not None:
            raise ConfigError("this model is quantized already; load the full-precision model to quantize it again")
        config = quant_config if isinstance(quant_config, QuantConfig) else QuantConfig.from_dict(quant_config or {})
        if settings:
            config = QuantConfig.from_dict({**dataclasses.asdict(config), **settings})
        calibration = load_calibration(
            tokenizer,
            calib_data,
            max_samples=max_calib_samples,
            max_seq_len=max_calib_seq_len,
            packing=packing,
            split=split,
            text_column=text_column,
            seed=seed,
            vocab_size=self.model.get_input_embeddings().num_embeddings,
        )
        if progress:
            print(calibration.describe())
        self.quant_config, self.report = quantize_model(self.model, config, calibration, progress)
        return self.report

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: int | str = "5GB") -> None:
        """Writes the quantized model; a stopped save leaves nothing that loads.

        shard_size: the most bytes of one file, such as "5GB".
        """
        if self.quant_config is None:
            raise ConfigError("this model is not quantized yet; call quantize() before save_quantized()")
        if not safetensors:
            raise ConfigError("checkpoints are saved as safetensors only; leave safetensors=True")
        save_model(self.model, self.quant_config, Path(save_dir), shard_size, self.report)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate, with everything transformers offers there."""
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, AutoQForCausalLM):
            kwargs["assistant_model"] = assistant.model
        return self.model.generate(*args, **kwargs)


def _take_hub_options(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    unknown = [name for name in options if name not in (*_HUB_OPTIONS, *_AUTOAWQ_OPTIONS)]
    if unknown:
        raise TypeError(f"AutoQForCausalLM.{method}() got an unexpected keyword argument {unknown[0]!r}")
    return {name: value for name, value in options.items() if name in _HUB_OPTIONS}
