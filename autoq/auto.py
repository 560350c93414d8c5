"""The class users meet: load, quantize, save, load again, generate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerBase

from autoq.architectures import architecture_of
from autoq.checkpoint import lacks_tensor
from autoq.config import QuantConfig
from autoq.errors import CalibrationError, CheckpointError, ConfigError, first_line
from autoq.inputs import context_length, explained
from autoq.loading import check_dtype, find_checkpoint, leave_on_disk, load_quantized
from autoq.nn import QuantLinear, shares_head
from autoq.nn.block import fuse_blocks
from autoq.nn.spread import connect, disconnect, is_offloaded, remove_hooks
from autoq.nn.steps import RecordedSteps, record_steps
from autoq.ops import MODES
from autoq.placement import (
    STRATEGIES,
    DeviceMap,
    byte_count,
    device_named,
    parts_of,
    present_device_map,
    torch_device,
)
from autoq.quantization.calibration import CalibrationSet, load_calibration
from autoq.quantization.pipeline import Quantizer, Run
from autoq.quantization.ranks import Ranks, join_torchrun
from autoq.quantization.report import QuantizationReport
from autoq.saving import save_model

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
# AutoAWQ's options that mean nothing here; they are accepted so that its users' code runs.
_AUTOAWQ_OPTIONS = {
    "from_pretrained": ("download_kwargs", "low_cpu_mem_usage", "safetensors", "trust_remote_code", "use_cache"),
    "from_quantized": (
        "batch_size", "download_kwargs", "exllama_config", "max_seq_len", "safetensors",
        "trust_remote_code", "use_exllama", "use_exllama_v2", "use_ipex", "use_qbits",
    ),
    "quantize": ("export_compatible", "max_chunk_memory", "n_parallel_calib_samples", "quantizer_cls"),
}  # fmt: skip


_INTERRUPTED = "quantizing this model was interrupted, which left it half done; load the full-precision model again"


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
        self._interrupted = False

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
        device_map: as transformers takes it; for a model larger than a GPU see also `device` of `quantize`. "disk"
            leaves all weights in their files, from which `quantize` reads one block at a time.
        Other keywords go to transformers' `from_pretrained`.
        Raises ArchitectureError if the family is not known, so that nothing is downloaded or loaded for nothing.
        """
        torch_dtype = kwargs.pop("dtype", torch_dtype)
        _check_path("model_path", model_path)
        if isinstance(device_map, str) and device_map not in STRATEGIES:
            device_named(device_map)  # or a sentence
        kwargs = _without_autoawq_options(kwargs, "from_pretrained")
        hub_options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
        try:
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=False, **hub_options)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"no model could be read from {model_path}: it is neither a directory with the config.json of a model "
                f"that transformers has built in, nor a hub repository that can be reached ({first_line(error)})"
            ) from error
        architecture_of(config)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(f"{model_path} is quantized already; load it with AutoQForCausalLM.from_quantized")
        check_dtype(torch_dtype)
        if device_map == "disk":
            others = [name for name in kwargs if name not in _HUB_OPTIONS]
            if others:
                raise TypeError(f"from_pretrained with device_map='disk' takes no keyword argument {others[0]!r}")
            return cls(leave_on_disk(find_checkpoint(model_path, **hub_options), config, torch_dtype))
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=torch_dtype,
                device_map=device_map,
                trust_remote_code=False,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"the model in {model_path} cannot be loaded ({first_line(error)})") from error
        model, found = loaded
        if found["missing_keys"]:  # which transformers would leave at random
            raise lacks_tensor(model_path, min(found["missing_keys"]))
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1 and not is_offloaded(model):
            # One way of moving tensors, for full-precision models as for quantized ones.
            remove_hooks(model)
            connect(model, [part.name for part in parts_of(model) if part.is_module])
        return cls(model.eval())

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        quant_filename: str = "",
        *,
        device_map: DeviceMap | None = "auto",
        torch_dtype: torch.dtype | str = "auto",
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        mode: str = "exact",
        fuse_layers: bool = True,
        kv_cache_bits: int | None = None,
        **hub_options: Any,
    ) -> AutoQForCausalLM:
        """Loads a quantized checkpoint: one of autoq's, or an AWQ checkpoint in the GEMM format.

        quant_path: a directory or a hub name.
        quant_filename: AutoAWQ's; the files are those the checkpoint's index names, and this is ignored.
        device_map: "auto" and "balanced" load the GPUs evenly, "balanced_low_0" spares the first, "sequential" fills
            one after the other; or a device, or a dict from module names to devices. What the GPUs cannot hold runs on
            the CPU; what that cannot hold goes to the "disk", in `offload_folder`, and is read whenever it runs.
        max_memory: the bytes each device may hold, `{0: "20GiB", "cpu": "60GiB"}`; those it does not name, none.
        torch_dtype: of activations and unquantized weights; "auto" is the checkpoint's own.
        mode: of the linears on a CPU where there are many rows, as in a prompt: "exact", or "int8", which rounds
            activations to 8 bits and is a little faster on some processors; see `autoq.ops.linear`.
        fuse_layers: decoder blocks run in one native call each, without gradients, and give the same tokens; whole
            decoding steps are recorded once and replayed, on a GPU as CUDA graphs. False runs transformers' own.
        kv_cache_bits: 8 keeps keys and values in 8 bits, with a scale for each head of each token, where blocks are
            fused: half the memory of a long context, and less to read. None keeps them in the model's dtype.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`. Options AutoAWQ had for its backends are
            accepted and ignored with a warning.

        Raises CheckpointError when the checkpoint is incomplete, damaged, unsafe to read or not quantized.
        """
        _check_path("quant_path", quant_path)
        if kv_cache_bits not in (None, 8):
            raise ConfigError(f"kv_cache_bits is {kv_cache_bits!r}; it should be 8, or None for the model's dtype")
        if not isinstance(fuse_layers, bool):
            raise ConfigError(f"fuse_layers is {fuse_layers!r} but must be True or False")
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}; it should be one of {', '.join(map(repr, MODES))}")
        torch_dtype = hub_options.pop("dtype", torch_dtype)
        hub_options = _without_autoawq_options(hub_options, "from_quantized", quant_filename=quant_filename)
        for name in hub_options:
            if name not in _HUB_OPTIONS:
                raise TypeError(f"AutoQForCausalLM.from_quantized() got an unexpected keyword argument {name!r}")
        model, quant_config = load_quantized(
            find_checkpoint(quant_path, **hub_options),
            device_map=device_map,
            torch_dtype=torch_dtype,
            max_memory=max_memory,
            offload_folder=offload_folder,
            fuse=fuse_layers,
        )
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.mode = mode
        fused = fuse_blocks(model, quantized_cache=kv_cache_bits == 8) if fuse_layers else 0
        if fused:
            record_steps(model)
        if kv_cache_bits is not None and not fused:
            warnings.warn("kv_cache_bits has no effect: no block of this model is fused", stacklevel=2)
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
        device: str | int | torch.device | Sequence[str | int | torch.device] | None = None,
        max_memory: int | str | None = None,
        work_dir: str | Path | None = None,
        statistics: str | Path | None = None,
        awq_cache: str | Path | None = None,
        eval_data: Any = None,
        max_eval_samples: int = 16,
        max_kl: float | None = None,
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
        device: where blocks are run and searched: each is brought there and back, so that a model in the CPU's memory
            needs no more of a GPU than a block takes. Of several devices, blocks take turns, and are searched at the
            same time. None: every block where it is.
        max_memory: the memory the process may take, such as "16GiB". What flows between blocks goes to the disk if it
            must; weights stay there if the model was loaded with `device_map="disk"`. A run that cannot fit is refused
            before it begins.
        work_dir: a directory that keeps every block that is done: a run that is stopped, however it is, goes on from
            there when it is started again, and ends with the same bits. Delete it once the model is saved.
        statistics: a directory for the statistics of the calibration; if they are there already, they are used, for
            any bits and group size, and nothing is calibrated (but with `effort="best"`, which needs the samples).
        awq_cache: a file for the results of the AWQ search, in llm-awq's format; if it is there already, its scales and
            clips are applied, and AWQ's search is left out.
        eval_data: text that the result is judged by, as `calib_data`; None: what that has left over, if it has.
        max_eval_samples: samples of it to use; 0 leaves the judgement out.
        max_kl: the KL divergence from the full-precision model (mean over held-out positions, in nats) beyond which
            `save_quantized` refuses to save the result.
        Under `torchrun` the processes share the samples and the blocks; all end with the same model. On several
            machines, `work_dir` and `statistics` have to be where all reach them. `effort="best"` needs a `work_dir`.
        Returns the report, which is kept as `report` too.

        Raises ConfigError, CalibrationError, ArchitectureError or QuantizationError, each a sentence.
        """
        if self._interrupted:
            raise ConfigError(_INTERRUPTED)
        join_torchrun()
        if self.quant_config is not None:
            raise ConfigError("this model is quantized already; load the full-precision model to quantize it again")
        settings = _without_autoawq_options(settings, "quantize")
        if not isinstance(quant_config, (QuantConfig, Mapping, type(None))):
            raise ConfigError(f"quant_config is {quant_config!r} but must be a dict or a QuantConfig")
        if isinstance(quant_config, QuantConfig):
            config = quant_config.updated(settings)
        else:
            config = QuantConfig.from_dict({**(quant_config or {}), **settings})
        for name, value in (("max_calib_samples", max_calib_samples), ("max_calib_seq_len", max_calib_seq_len)):
            if type(value) is not int or value < 1:
                raise CalibrationError(f"{name} is {value!r}; it should be a number of at least 1")
        context = context_length(self.model.config)
        if context is not None and max_calib_seq_len > context:
            if Ranks().is_first:
                print(f"calibration samples are cut to {context} tokens, the context of the model")
            max_calib_seq_len = context
        if max_kl is not None and (type(max_kl) not in (int, float) or not max_kl > 0):
            raise ConfigError(f"max_kl is {max_kl!r}; it should be a positive number of nats, such as 0.05")
        if type(max_eval_samples) is not int or max_eval_samples < 0:
            raise ConfigError(f"max_eval_samples is {max_eval_samples!r}; it should be a number of samples, 0 for none")

        def load(data: Any, count: int, argument: str) -> CalibrationSet:
            return load_calibration(
                tokenizer,
                data,
                max_samples=count,
                max_seq_len=max_calib_seq_len,
                packing=packing,
                split=split,
                text_column=text_column,
                seed=seed,
                vocab_size=self.model.get_input_embeddings().num_embeddings,
                argument=argument,
            )

        extra = max_eval_samples if eval_data is None else 0
        calibration, held_out = load(calib_data, max_calib_samples + extra, "calib_data").split(max_calib_samples)
        if eval_data is not None and max_eval_samples:
            held_out = load(eval_data, max_eval_samples, "eval_data")
            if held_out.overlaps(calibration):
                warnings.warn(
                    "eval_data holds samples that the model is calibrated on too; perplexity and KL divergence will "
                    "look better than they are on other text",
                    stacklevel=2,
                )
        if eval_data is None and held_out is not None and len(held_out.samples) < Ranks().size:
            held_out = None  # too little is left over to be shared
        if max_kl is not None and held_out is None:
            raise ConfigError(
                "max_kl needs text that takes no part in the calibration, but none is left over; pass some as "
                "eval_data, and leave max_eval_samples above 0"
            )
        for name, path in (("work_dir", work_dir), ("statistics", statistics), ("awq_cache", awq_cache)):
            if path is not None:
                _check_path(name, path)
        run = Run(
            devices=_devices(device),
            max_memory=None if max_memory is None else byte_count(max_memory, "max_memory"),
            work_dir=None if work_dir is None else Path(work_dir),
            statistics=None if statistics is None else Path(statistics),
            awq_cache=None if awq_cache is None else Path(awq_cache),
            held_out=held_out,
            progress=progress,
        )
        training = self.model.training
        try:
            quantizer = Quantizer(self.model.eval(), config, calibration, run)
            if progress and Ranks().is_first:
                print(quantizer.source.description)
            # Folding and replacing happen in place: what a stopped run leaves behind is no model.
            self._interrupted = True
            self.quant_config, self.report = quantizer.quantize()
            self.report.max_kl = max_kl
            if fuse_blocks(self.model):
                record_steps(self.model)
            self._interrupted = False
        finally:
            self.model.train(training)
        return self.report

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # All of `.to`, `.cuda`, `.cpu`, `.half` and the like.
        if is_offloaded(self.model):
            raise ConfigError(
                "some weights of this model are offloaded, so it can be neither moved nor cast; load it again with the "
                "device_map and the torch_dtype it should have"
            )
        shared = shares_head(self.model)
        super()._apply(fn, recurse)
        if shared:
            self.model.get_output_embeddings().take_weight_of(self.model.get_input_embeddings())
        if isinstance(forward := self.model.__dict__.get("forward"), RecordedSteps):
            forward.forget()  # what they hold would stay where the model was
        if getattr(self.model, "hf_device_map", None) is not None:
            self.model.hf_device_map = present_device_map(self.model)
            if len(self.model.hf_device_map) == 1:
                disconnect(self.model)
        return self

    def save_quantized(
        self,
        save_dir: str | Path,
        safetensors: bool = True,
        shard_size: int | str | None = None,
        ignore_max_kl: bool = False,
    ) -> None:
        """Writes the quantized model; a stopped save leaves nothing that loads.

        shard_size: the most bytes of one file, such as "5GB" (the default; 500MB for a model that is on the disk, since
            they are in memory while it is written).
        ignore_max_kl: save it even if its KL divergence is beyond the `max_kl` that `quantize` was given.
        Of several processes started by `torchrun`, the first writes.
        """
        _check_path("save_dir", save_dir)
        if self._interrupted:
            raise ConfigError(_INTERRUPTED)
        if self.quant_config is None:
            raise ConfigError("this model is not quantized yet; call quantize() before save_quantized()")
        if not safetensors:
            raise ConfigError("checkpoints are saved as safetensors only; leave safetensors=True")
        if self.report is not None and not ignore_max_kl:
            self.report.check_quality()
        if Ranks().is_first:
            save_model(self.model, self.quant_config, Path(save_dir), shard_size, self.report)

    def save_pretrained(self, *_args: Any, **_options: Any) -> None:
        """Refused: transformers would save packed tensors that nothing can read."""
        raise ConfigError("save a quantized model with save_quantized(), any other with its model.save_pretrained()")

    push_to_hub = save_pretrained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward; input tensors are moved to its device."""
        if self._interrupted:
            raise ConfigError(_INTERRUPTED)
        args, kwargs = self._on_device(args, kwargs)
        ids = args[0] if args else kwargs.get("input_ids")

        def held() -> int:
            cache = kwargs.get("past_key_values")
            return cache.get_seq_length() if isinstance(cache, Cache) else 0

        with explained(self.model.config, ids, held, "in the cache"):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate, with everything transformers offers there; input tensors are moved to its
        device."""
        if self._interrupted:
            raise ConfigError(_INTERRUPTED)
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, AutoQForCausalLM):
            kwargs["assistant_model"] = assistant.model
        args, kwargs = self._on_device(args, kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        with explained(self.model.config, ids, lambda: kwargs.get("max_new_tokens") or 0, "asked for"):
            return self.model.generate(*args, **kwargs)

    def _on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        device = self.model.device
        if device.type == "meta":  # offloaded: accelerate's hooks move the inputs
            return args, kwargs

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}


def _check_path(name: str, path: Any) -> None:
    if not isinstance(path, (str, Path)) or path == "":
        raise ConfigError(f"{name} is {path!r}; it should be a path")


def _devices(device: Any) -> list[torch.device]:
    """The devices that `quantize` was given."""
    if device is None:
        return []
    several = isinstance(device, (list, tuple))
    names = [
        device_named(one, "device is", "Give a device such as 'cuda:0', or a list of devices")
        for one in (device if several else [device])
    ]
    if not names or "disk" in names:
        raise ConfigError(f"device is {device!r}; blocks are searched on a device such as 'cuda:0', or a list of them")
    return [torch_device(name) for name in names]


def _without_autoawq_options(options: Mapping[str, Any], method: str, **others: Any) -> dict[str, Any]:
    """The options but for those of AutoAWQ that mean nothing here; says which had a value that asked for something."""
    ignored = [name for name in options if name in _AUTOAWQ_OPTIONS[method]]
    asked = [name for name, value in {**{name: options[name] for name in ignored}, **others}.items() if value]
    if asked:
        warnings.warn(f"ignored, as the model runs the same without: {', '.join(asked)}", stacklevel=3)
    return {name: value for name, value in options.items() if name not in ignored}
