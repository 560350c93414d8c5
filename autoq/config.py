"""How a model is quantized. The only home of the key names other packages use for the same settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoq.errors import ConfigError
from autoq.quantization.weight import SUPPORTED_BITS

GROUP_SIZES = (16, 32, 64, 128, 256, -1)
EFFORTS = ("fast", "default", "best")
# What every family calls its output head.
LM_HEAD = "lm_head"
# What settings call the token embeddings, which every family names differently.
EMBEDDINGS = "embeddings"
# The parts that have a width and a group size of their own, and what the names of those settings begin with.
_OWN_SETTINGS = {LM_HEAD: "lm_head", EMBEDDINGS: "embedding"}

# Names from llm-awq, AutoAWQ and transformers, and ours.
_LEGACY_KEYS = {"w_bit": "bits", "q_group_size": "group_size", "format": "version"}


@dataclass(frozen=True)
class QuantConfig:
    """The settings of a quantization.

    bits: width of a code: 2, 3, 4 or 8.
    target_bits: the mean width of the blocks' codes, such as 4.25: each linear gets 2, 3, 4 or 8 bits, by what that
        does to its block's output. Only autoq loads such a checkpoint. None: all have `bits`.
    group_size: weights that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row.
    zero_point: True for an integer zero point per group, False for symmetric ranges.
    version: the on-disk format: "gemm" (4 bits, read by every AWQ engine) or "dense" (any width, our own). Left out,
        it is "gemm" where that can hold the weights and "dense" elsewhere.
    modules_to_not_convert: linears whose full name contains one of these strings stay as they are.
    indivisible: what happens to a linear whose input features the group size does not divide: "smaller" takes the
        largest smaller group size that does, "skip" leaves the linear as it is. Either is listed in the report.
    effort: "fast" (AWQ's search, then rounding that makes up for its errors), "default" (besides, each end of a range
        moved on its own, and codes and scales refined on the same statistics) or "best" (besides, each block tuned by
        gradient descent, which takes many times as long). What is on disk is the same.
    apply_scale: whether to search and fold the scales of AWQ. Without it, `apply_clip` and `compensate`, what remains
        of the efforts below "best" is rounding to the nearest.
    duo_scaling: whether the scale search weighs the magnitude of the weights too, not only of the activations.
    apply_clip: whether to search the range weights are clipped to.
    compensate: whether rounding makes up for the error of each weight in those not rounded yet (GPTQ), on the same
        statistics; False rounds each to the nearest, and leaves out the refinement of codes and scales.
    scale_activations: whether linears behind a nonlinearity get a scale too, through a scaled activation. More
        accurate, but vLLM and SGLang cannot load such checkpoints.
    lm_head_bits: width of the codes of the output head; None leaves it as it is. In a small model the head is a large
        part of the bytes that a token reads. Other engines cannot load a checkpoint with a quantized head.
    lm_head_group_size: weights of the head that share a scale.
    embedding_bits: width of the codes of the token embeddings; None leaves them as they are. They take no time, but in
        a small model, or one of a large vocabulary, much of the memory. A head that is tied to them shares their codes
        if it has the same settings; otherwise it is untied, and each is as its own settings say. Other engines cannot
        load a checkpoint with quantized embeddings.
    embedding_group_size: weights of a token's embedding that share a scale.
    module_group_sizes: the linears whose group size differs from `group_size`; filled in by quantization.
    module_bits: the linears whose width differs from `bits`; filled in by quantization for `target_bits`.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = ""
    modules_to_not_convert: tuple[str, ...] = ()
    indivisible: str = "smaller"
    effort: str = "default"
    apply_scale: bool = True
    duo_scaling: bool = True
    apply_clip: bool = True
    compensate: bool = True
    scale_activations: bool = False
    lm_head_bits: int | None = None
    lm_head_group_size: int = 128
    embedding_bits: int | None = None
    embedding_group_size: int = 128
    module_group_sizes: Mapping[str, int] = field(default_factory=dict)
    target_bits: float | None = None
    module_bits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.version, str):
            raise ConfigError(f'version is {self.version!r}; it should be the name of a format, such as "gemm"')
        if not self.version:
            object.__setattr__(self, "version", "gemm" if self.bits == 4 and not self.is_mixed else "dense")
        _one_of("bits", self.bits, SUPPORTED_BITS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        for name in _OWN_SETTINGS.values():
            _one_of(f"{name}_bits", getattr(self, f"{name}_bits"), (*SUPPORTED_BITS, None))
            _one_of(f"{name}_group_size", getattr(self, f"{name}_group_size"), GROUP_SIZES)
        _one_of("indivisible", self.indivisible, ("smaller", "skip"))
        _one_of("effort", self.effort, EFFORTS)
        for name in ("zero_point", "apply_scale", "duo_scaling", "apply_clip", "compensate", "scale_activations"):
            _one_of(name, getattr(self, name), (True, False))
        for name, size in self.module_group_sizes.items():
            _one_of(f"module_group_sizes[{name!r}]", size, GROUP_SIZES)
        for name, bits in self.module_bits.items():
            _one_of(f"module_bits[{name!r}]", bits, SUPPORTED_BITS)
        low, high = min(SUPPORTED_BITS), max(SUPPORTED_BITS)
        target = self.target_bits
        if target is not None and (type(target) not in (int, float) or not low <= target <= high):
            raise ConfigError(f"target_bits is {target!r}; it should be a number from {low} to {high}, such as 4.25")
        if self.lm_head_bits is not None and LM_HEAD in self.modules_to_not_convert:
            raise ConfigError(f"{LM_HEAD} is in modules_to_not_convert, but lm_head_bits asks to quantize it")
        if self.version == "gemm" and (self.bits != 4 or self.is_mixed):
            raise ConfigError(
                f"the gemm format holds 4-bit weights only, not {'mixed' if self.is_mixed else self.bits}-bit ones; "
                'leave "version" out, or set it to "dense"'
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From a user's `quant_config`; the names other packages use are understood.

        Raises ConfigError for an unknown setting, one given twice, or a value out of range.
        """
        return cls(**_settings(values))

    def updated(self, values: Mapping[str, Any]) -> QuantConfig:
        """With other settings in the place of some, by any of their names; raises ConfigError as `from_dict`."""
        names = {_LEGACY_KEYS.get(name, name) for name in values}
        settings = {name: value for name, value in _settings(values).items() if name in names}
        # Other bits may need another format than the one this config settled on.
        version = {"version": ""} if names & {"bits", "target_bits", "module_bits"} else {}
        return dataclasses.replace(self, **{**version, **settings})

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From the `quantization_config` of a checkpoint; what other writers add to it is ignored."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"quantization_config is a {type(values).__name__}; it should be a dict")
        known = {entry.name for entry in dataclasses.fields(cls)} | set(_LEGACY_KEYS)
        settings = _settings({key: value for key, value in values.items() if key in known})
        if values.get("symmetric") is True:  # see to_dict
            settings["zero_point"] = False
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint, in the words AWQ engines read.

        Symmetric GEMM weights are saved with their zero points written out (all 8) and `zero_point: true`: vLLM's
        fast kernels refuse AWQ checkpoints without zero points. `symmetric` keeps what they are.
        """
        gemm = self.version == "gemm"
        saved: dict[str, Any] = {
            "quant_method": "awq" if gemm else "autoq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point or gemm,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }
        if not self.zero_point:
            saved["symmetric"] = True
        if self.module_group_sizes:
            saved["module_group_sizes"] = dict(self.module_group_sizes)
        if self.module_bits:
            saved["module_bits"] = dict(self.module_bits)
        if self.scale_activations:
            saved["scale_activations"] = True
        for part, prefix in _OWN_SETTINGS.items():
            if self._own(part, "bits") is not None:
                saved.update({f"{prefix}_{name}": self._own(part, name) for name in ("bits", "group_size")})
        return saved

    @property
    def is_mixed(self) -> bool:
        """Whether linears differ in the width of their codes."""
        return self.target_bits is not None or bool(self.module_bits)

    def bits_for(self, name: str) -> int:
        """The width of a linear's codes, or of those of EMBEDDINGS."""
        return self._own(name, "bits") or self.module_bits.get(name, self.bits)

    def version_for(self, name: str) -> str:
        """The on-disk format of a linear, or of EMBEDDINGS: what only autoq reads anyway is dense."""
        return "dense" if self._own(name, "bits") else self.version

    def group_size_for(self, name: str, in_features: int) -> int | None:
        """The group size of a linear, or of EMBEDDINGS; None when it stays as it is because no group size divides
        it."""
        default = (self._own(name, "bits") and self._own(name, "group_size")) or self.group_size
        size = self.module_group_sizes.get(name, default)
        if size == -1 or in_features % size == 0:
            return size
        if self.indivisible == "smaller":
            return next((s for s in (128, 64, 32, 16) if s < size and in_features % s == 0), None)
        return None

    def _own(self, name: str, setting: str) -> int | None:
        """A setting of a part of the model that has settings of its own."""
        value: int | None = getattr(self, f"{_OWN_SETTINGS[name]}_{setting}") if name in _OWN_SETTINGS else None
        return value

    def converts(self, name: str) -> bool:
        """Whether a linear of this full name is to be quantized."""
        if name == LM_HEAD:
            return self.lm_head_bits is not None
        return not any(pattern in name for pattern in self.modules_to_not_convert)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by our names, as far as they can be told from a dict alone."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"quant_config is a {type(values).__name__}; it should be a dict such as {{'bits': 4}}")
    known = {entry.name for entry in dataclasses.fields(QuantConfig)}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = _LEGACY_KEYS.get(key, key)
        if name not in known:
            raise ConfigError(f"unknown setting {key!r} in the quantization config; known are {sorted(known)}")
        if name in settings and settings[name] != value:
            raise ConfigError(f"the quantization config gives {name!r} twice, as {settings[name]!r} and {value!r}")
        settings[name] = value
    if isinstance(settings.get("version"), str):
        settings["version"] = settings["version"].lower()
    settings["modules_to_not_convert"] = _strings("modules_to_not_convert", settings.get("modules_to_not_convert"))
    if not isinstance(settings.get("module_group_sizes", {}), Mapping):
        raise ConfigError("module_group_sizes should be a dict from a linear's name to its group size")
    if not isinstance(settings.get("module_bits", {}), Mapping):
        raise ConfigError("module_bits should be a dict from a linear's name to the width of its codes")
    return settings


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # type() too: True == 1 and 4.0 == 4, but neither is what the setting means.
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ConfigError(f"{name} is {value!r}; it should be one of {', '.join(map(repr, choices))}")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    sequence = isinstance(value, (list, tuple, set))
    if not sequence or not all(isinstance(entry, str) and entry for entry in value):
        raise ConfigError(f"{name} is {value!r}; it should be a list of (parts of) names of linears")
    return tuple(value)
