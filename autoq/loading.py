"""Builds a running model from a quantized checkpoint."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import offload_weight, save_offload_index
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from autoq.architectures import architecture_of, known_model_types
from autoq.checkpoint import CONFIG, CheckpointReader, lacks_tensor, read_json
from autoq.config import EMBEDDINGS, LM_HEAD, QuantConfig
from autoq.errors import CheckpointError, ConfigError, first_line
from autoq.formats import Format, LinearSpec, TensorSpec, get_format
from autoq.nn import QuantEmbedding, QuantLinear, QuantModule, ScaledActivation
from autoq.nn.block import linears_read_together
from autoq.nn.linear import replace_module
from autoq.nn.spread import DiskWeights, connect, fetch_from_disk
from autoq.packed import PackedWeight
from autoq.placement import Device, DeviceMap, Placement, parts_of, place, tied_names, torch_device

# Where older tools keep what config.json now holds.
_NOT_FOR_TRANSFORMERS = (
    "quantization_config", "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "transformers_version",
)  # fmt: skip
# Tensors that older releases of transformers saved and newer ones compute.
_COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.(bias|masked_bias))")
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json")


# Linears that the system reads while others are packed.
_READ_AHEAD = 16


class _Stored(NamedTuple):
    """A quantized linear of a checkpoint, or its embeddings, how they are stored, and under which name."""

    spec: LinearSpec
    layout: Format
    name: str


def find_checkpoint(path: str | Path, **hub_options: Any) -> Path:
    """The local directory of a checkpoint: the path itself, or a snapshot of the hub repository of that name.

    hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as huggingface_hub takes them.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; give the directory that holds {CONFIG}")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"], **hub_options))
    except Exception as error:  # the hub's many errors, from bad names to no network, all mean one thing here
        raise CheckpointError(
            f"{path} is neither a directory nor a hub repository that can be reached ({first_line(error)})"
        ) from error


def _quant_config(directory: Path, config: Mapping[str, Any]) -> QuantConfig:
    """The quantization settings of a checkpoint directory, from its config.json or where older tools keep them."""
    settings = config.get("quantization_config")
    for name in _OLD_CONFIGS:
        if settings is None and (directory / name).is_file():
            settings = read_json(directory / name)
    if settings is None:
        raise CheckpointError(
            f"{directory / CONFIG} has no quantization_config: this checkpoint is not quantized. "
            "Load it with AutoQForCausalLM.from_pretrained and quantize it."
        )
    method = settings.get("quant_method", "awq") if isinstance(settings, dict) else "awq"
    if method not in ("awq", "autoq"):
        raise CheckpointError(f"{directory} was quantized with {method!r}; autoq loads AWQ and its own checkpoints")
    try:
        quant_config = QuantConfig.from_checkpoint(settings)
        get_format(quant_config.version)
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None
    return quant_config


def load_quantized(
    directory: Path,
    *,
    device_map: DeviceMap | None,
    torch_dtype: torch.dtype | str,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
    fuse: bool,
) -> tuple[PreTrainedModel, QuantConfig]:
    """Builds the model a checkpoint describes, with its weights packed and placed.

    fuse: its blocks will be, and the linears that they read together are to lie behind each other.
    """
    settings = read_json(directory / CONFIG)
    quant_config = _quant_config(directory, settings)
    config = _model_config(directory, settings)
    with CheckpointReader(directory) as reader:
        model = _empty_model(config, _resolve_dtype(torch_dtype, config))
        quantized = _insert_quantized_modules(model, reader, quant_config)
        _insert_scaled_activations(model, reader)
        tied = tied_names(model)
        _check_tensors(model, reader, quantized, tied)
        model.tie_weights()
        placement = place(model, device_map, max_memory)
        loader = _Loader(model, placement, offload_folder)
        devices = placement.by_tensor()
        together = linears_read_together(model) if fuse else []
        # On other devices they are copied once more.
        together = [names for names in together if all(devices[f"{name}.codes"] == "cpu" for name in names)]
        for name, tensor in _tensors(model, reader, quantized, tied, together):
            loader.put(name, tensor)
        for name, source in tied.items():
            if devices[name] == "disk":
                # Only tensors in memory can be one; where they are fetched, each needs its own.
                loader.put(name, reader.read(source).to(model.dtype))
        loader.finish()
        _share_weights(model, quantized)
    _read_generation_config(model, directory)
    return model.eval(), quant_config


def _read_generation_config(model: PreTrainedModel, directory: Path) -> None:
    path = directory / "generation_config.json"
    if path.is_file():
        settings = read_json(path)
        try:
            model.generation_config = GenerationConfig.from_dict(settings)
        except Exception as error:  # as for the model's config
            raise CheckpointError(f"{path} is not a generation config ({first_line(error)})") from None


def leave_on_disk(directory: Path, config: PretrainedConfig, torch_dtype: torch.dtype | str) -> PreTrainedModel:
    """A full-precision model whose weights stay in their files and are read whenever a part of it runs.

    torch_dtype: what they are converted to then; "auto" is the checkpoint's own.
    """
    with CheckpointReader(directory) as reader:
        floating = (spec.dtype for spec in reader.specs.values() if spec.dtype.is_floating_point)
        if torch_dtype == "auto" and getattr(config, "dtype", None) is None:
            torch_dtype = next(floating, torch.float32)
        model = _empty_model(config, _resolve_dtype(torch_dtype, config))
        tied = tied_names(model)
        index = {}
        for name, tensor in model.state_dict().items():
            names = [name, tied.get(name, name), *(other for other, source in tied.items() if source == name)]
            stored = _stored_name(names, model, reader)
            reader.check(stored, TensorSpec(reader.specs[stored].dtype, tuple(tensor.shape)))
            index[name] = {
                "safetensors_file": str(reader.paths[stored].absolute()),
                "weight_name": stored,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "range": reader.range_of(stored),  # for `read_ahead` of autoq/nn/spread.py
            }
    model.tie_weights()
    weights = DiskWeights(index=index)
    for part in parts_of(model):
        if part.is_module:
            fetch_from_disk(model, part.name, weights, torch.device("cpu"))
        else:
            owner, _, leaf = part.name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(weights[part.name], requires_grad=False)
    model.hf_device_map = {"": "disk"}  # type: ignore[assignment, unused-ignore]
    _read_generation_config(model, directory)
    return model.eval()


def _stored_name(names: Sequence[str], model: PreTrainedModel, reader: CheckpointReader) -> str:
    """What a checkpoint calls a tensor that has these names: some were saved without the part that all but the head
    share."""
    for name in names:
        for stored in (name, name.removeprefix(f"{model.base_model_prefix}.")):
            if stored in reader.specs:
                return stored
    raise CheckpointError(
        f"{reader.directory} has no tensor {names[0]}; to leave a model on the disk, its files must hold the tensors "
        "under the names they have in transformers: load it into memory and save it with save_pretrained once"
    )


def _model_config(directory: Path, config: Mapping[str, Any]) -> PretrainedConfig:
    # From here on the model is an ordinary one to transformers: its own AWQ loader must not step in. Nor may a
    # checkpoint choose code to run: its own, or an attention kernel to fetch.
    values = {name: value for name, value in config.items() if name not in _NOT_FOR_TRANSFORMERS}
    try:
        return CONFIG_MAPPING[str(values.get("model_type"))].from_dict(values)
    except Exception as error:  # a config can be wrong in more ways than transformers foresees
        raise CheckpointError(
            f"{directory / CONFIG} describes no model transformers knows ({first_line(error)})"
        ) from None


def check_dtype(torch_dtype: torch.dtype | str) -> None:
    """Raises ConfigError for a dtype that models are not run in."""
    named = getattr(torch, torch_dtype.removeprefix("torch."), None) if isinstance(torch_dtype, str) else torch_dtype
    if torch_dtype != "auto" and named not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"torch_dtype is {torch_dtype!r}; it should be float32, bfloat16, float16 or 'auto'")


def _resolve_dtype(torch_dtype: torch.dtype | str, config: PretrainedConfig) -> torch.dtype:
    check_dtype(torch_dtype)
    if torch_dtype == "auto":
        torch_dtype = getattr(config, "dtype", None) or torch.float16
        check_dtype(torch_dtype)
    if isinstance(torch_dtype, str):
        torch_dtype = getattr(torch, torch_dtype.removeprefix("torch."))
    assert isinstance(torch_dtype, torch.dtype)
    return torch_dtype


def _empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers that are computed, not loaded, are real."""
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if dtype == torch.float32:
                return model
            # What is computed is computed in fp32, as in transformers' own loading, whatever the weights' dtype. A
            # model notes its dtype in its config: this one in another.
            precise = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        stored = model.state_dict().keys()
        for name, buffer in precise.named_buffers():
            if name not in stored:
                model.get_buffer(name).copy_(buffer)
        return model
    except Exception as error:  # as above
        raise CheckpointError(f"the config describes no model that can be built ({first_line(error)})") from None


def _insert_quantized_modules(
    model: PreTrainedModel, reader: CheckpointReader, config: QuantConfig
) -> dict[str, _Stored]:
    """Puts empty quantized modules where the checkpoint has their codes; returns what they should look like."""
    directory = reader.directory
    found: dict[str, _Stored] = {}
    embeddings = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if isinstance(module, nn.Embedding) and module is not embeddings:
            continue
        if f"{name}.qweight" not in reader.specs:
            if f"{name}.scales" in reader.specs:
                raise lacks_tensor(directory, f"{name}.qweight")
            continue
        key, columns = EMBEDDINGS if module is embeddings else name, module.weight.shape[1]
        size = config.group_size_for(key, columns)
        if size is None:
            raise CheckpointError(
                f"{directory}: no group size that its config allows divides the {columns} columns of {name}"
            )
        spec = LinearSpec.of(module.weight, config.bits_for(key), size, config.zero_point)
        layout = get_format(config.version_for(key))
        obstacle = layout.obstacle(spec)
        if obstacle is not None:
            raise CheckpointError(f"{directory}: {name} is quantized, but {obstacle}")
        for leaf, wanted in layout.tensors(spec).items():
            reader.check(f"{name}.{leaf}", wanted)
        found[name] = _Stored(spec, layout, name)
        if isinstance(module, nn.Linear):
            replace_module(model, name, QuantLinear.empty(spec, module.bias))
        else:
            replace_module(model, name, QuantEmbedding.empty(spec, model.dtype))
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, QuantEmbedding):
        head = model.get_output_embeddings()
        if model.config.tie_word_embeddings and isinstance(head, nn.Linear):
            stored = next(entry for name, entry in found.items() if model.get_submodule(name) is embeddings)
            found[LM_HEAD] = stored
            replace_module(model, LM_HEAD, QuantLinear(embeddings.spec, embeddings.packed(), head.bias))
        model.config.tie_word_embeddings = False  # transformers could not tie them
    if not found:
        raise CheckpointError(f"{directory} says it is quantized, but holds no quantized linear of this model")
    return found


def _insert_scaled_activations(model: PreTrainedModel, reader: CheckpointReader) -> None:
    """Replaces the activations the checkpoint has scales for."""
    if model.config.model_type not in known_model_types():
        return
    architecture = architecture_of(model.config)
    for index, block in enumerate(architecture.decoder_blocks(model)):
        for group in architecture.scale_groups:
            name = f"{architecture.blocks}.{index}.{group.prev}.scales"
            if group.activation and name in reader.specs:
                channels = int(block.get_submodule(group.linears[0]).in_features)  # type: ignore[arg-type]
                act = ScaledActivation(block.get_submodule(group.prev), channels, model.dtype)
                replace_module(block, group.prev, act.to("meta"))


def _plain_tensors(model: PreTrainedModel, quantized: Mapping[str, _Stored]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors that a checkpoint holds as they are, with their names (a quantized linear's bias too)."""
    packed = {f"{name}.{leaf}" for name in quantized for leaf in PackedWeight._fields}
    for name, tensor in model.state_dict().items():
        if name not in packed:
            yield name, tensor


def _check_tensors(
    model: PreTrainedModel,
    reader: CheckpointReader,
    quantized: Mapping[str, _Stored],
    tied: Mapping[str, str],
) -> None:
    """Raises CheckpointError unless the checkpoint holds exactly the tensors this model has."""
    known = {f"{name}.{leaf}" for spec, layout, name in quantized.values() for leaf in layout.tensors(spec)}
    for name, tensor in _plain_tensors(model, quantized):
        known.add(name)
        if name in tied:
            continue
        found = reader.specs.get(name)
        # Any floating dtype is converted on the way in; the shape and the kind have to be right.
        convertible = found is not None and found.dtype.is_floating_point and tensor.is_floating_point()
        dtype = found.dtype if found is not None and convertible else tensor.dtype
        reader.check(name, TensorSpec(dtype, tuple(tensor.shape)))
    unknown = sorted(name for name in reader.specs if name not in known and not _COMPUTED.fullmatch(name))
    if unknown:
        raise CheckpointError(
            f"{reader.directory} holds {len(unknown)} tensor{'s' if unknown[1:] else ''} that the model its config "
            f"describes does not have, {unknown[0]} first; config.json and the tensors do not belong together"
        )
    for name, source in tied.items():
        if name in reader.specs and not torch.equal(reader.read(name), reader.read(source)):
            raise CheckpointError(
                f"{reader.directory}: the config ties {name} to {source}, but the checkpoint holds two tensors that "
                "differ; set tie_word_embeddings to false in config.json if they should"
            )


def _tensors(
    model: PreTrainedModel,
    reader: CheckpointReader,
    quantized: Mapping[str, _Stored],
    tied: Mapping[str, str],
    together: Sequence[Sequence[str]],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, read and packed one linear at a time; those of `together` lie behind each other."""
    linears = dict.fromkeys(quantized.values())
    rooms: dict[str, PackedWeight] = {}
    upcoming = iter([f"{name}.{leaf}" for leaf in layout.tensors(spec)] for spec, layout, name in linears)
    for names in islice(upcoming, _READ_AHEAD):
        reader.read_ahead(names)
    for spec, layout, name in linears:
        reader.read_ahead(next(upcoming, ()))
        tensors = {leaf: reader.read(f"{name}.{leaf}") for leaf in layout.tensors(spec)}
        if not torch.isfinite(tensors["scales"]).all():
            raise CheckpointError(f"{reader.directory}: {name}.scales holds NaN or infinity; the checkpoint is damaged")
        if name not in rooms:
            rooms |= _room(name, quantized, together)
        layout.repack(tensors, spec, rooms[name])
        for leaf, buffer in rooms.pop(name)._asdict().items():
            for user in (user for user, stored in quantized.items() if stored.name == name):
                yield f"{user}.{leaf}", buffer
        del buffer  # where it went to another device, its memory is for the next
    plain = {name: tensor for name, tensor in _plain_tensors(model, quantized) if name not in tied}
    reader.read_ahead(plain)
    for name, tensor in plain.items():
        yield name, reader.read(name).to(tensor.dtype)


def _room(name: str, quantized: Mapping[str, _Stored], together: Sequence[Sequence[str]]) -> dict[str, PackedWeight]:
    """Memory for a quantized linear, and for those that are read together with it, which lie behind each other."""
    names = next((names for names in together if name in names), [name])
    specs = [quantized[each].spec for each in names]
    outputs = [spec.out_features for spec in specs]
    whole = PackedWeight.empty(sum(outputs), specs[0].in_features, specs[0].groups, specs[0].bits)
    return dict(zip(names, whole.split(outputs), strict=True))


def _share_weights(model: PreTrainedModel, quantized: Mapping[str, _Stored]) -> None:
    """Has modules that are stored as one share their tensors, where they are on one device."""
    for name, stored in quantized.items():
        module, source = model.get_submodule(name), model.get_submodule(stored.name)
        assert isinstance(module, QuantModule)
        assert isinstance(source, QuantModule)
        if module is not source and module.codes.device == source.codes.device and not module.codes.is_meta:
            module.take_weight_of(source)


class _Loader:
    """Puts tensors where a placement says."""

    def __init__(self, model: PreTrainedModel, placement: Placement, offload_folder: str | Path | None) -> None:
        self._model = model
        self._placement = placement
        self._devices = placement.by_tensor()
        self._offload_index: dict[str, Any] = {}
        self._folder = ""
        if "disk" in self._devices.values():
            # A directory of its own: another model's tensors have the same names.
            if offload_folder is not None:
                Path(offload_folder).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.mkdtemp(prefix="autoq-offload-", dir=offload_folder)
            weakref.finalize(model, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, name: str, tensor: Tensor) -> None:
        """Straight from the file's memory to the device: no device holds more than its own."""
        device = self._devices[name]
        if device == "disk" and name not in self._placement.devices:
            self._offload_index = offload_weight(tensor, name, self._folder, self._offload_index)
        else:
            self._assign(name, tensor.to(self._memory(device)))

    def _memory(self, device: Device) -> torch.device:
        """The device whose memory it is; for the disk, that of the one which runs what is there."""
        return torch_device(self._placement.runner if device == "disk" else device)

    def _assign(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            module._buffers[leaf] = tensor

    def finish(self) -> None:
        """Once every tensor is there: ties, computed buffers, and what moves tensors while the model runs."""
        model: Any = self._model
        placement = self._placement
        model.tie_weights()
        for name, buffer in list(model.named_buffers()):
            if not buffer.is_meta:
                self._assign(name, buffer.to(self._memory(self._devices[name])))
        if self._folder:
            save_offload_index(self._offload_index, self._folder)
            weights = DiskWeights(save_folder=self._folder)
            for name in placement.modules():
                if placement.devices[name] == "disk":
                    fetch_from_disk(model, name, weights, self._memory("disk"))
        model.hf_device_map = placement.device_map()
        if len(set(placement.devices.values())) > 1:
            connect(model, placement.modules())
