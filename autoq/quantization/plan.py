"""What becomes of every linear of a model, settled before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from autoq.architectures import Architecture, ScaleGroup, architecture_of
from autoq.architectures.base import named_linears
from autoq.config import EMBEDDINGS, LM_HEAD, QuantConfig
from autoq.errors import ConfigError, QuantizationError
from autoq.formats import LinearSpec, get_format
from autoq.nn.spread import is_offloaded
from autoq.quantization import awq, search_ops
from autoq.quantization.report import QuantizationReport
from autoq.quantization.weight import fake_quantize

# Samples of one length go through a block together, up to this many tokens in all; as many for a step of the tuning.
_BATCH_TOKENS = 4096
_TUNING_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What becomes of every linear.

    group_sizes: of the linears to quantize, by full name, -1 for a whole row; specs: what they become.
    left_alone: why each other linear stays as it is.
    in_features: of every linear of the blocks.
    embeddings: what the token embeddings become; None: they stay as they are. tied: whether the head was tied to them.
    """

    architecture: Architecture
    model_config: PretrainedConfig
    config: QuantConfig
    group_sizes: dict[str, int]
    specs: dict[str, LinearSpec]
    left_alone: dict[str, str]
    in_features: dict[str, int]
    embeddings: LinearSpec | None = None
    tied: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, config: QuantConfig) -> Plan:
        """The plan for a model whose weights are in memory, or fetched from where it is known they are."""
        architecture = architecture_of(model.config)
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        plan = cls(architecture, model.config, config, {}, {}, {}, {}, _embeddings_spec(model, config), tied)
        for index, block in enumerate(architecture.decoder_blocks(model)):
            prefix = plan.block_name(index)
            architecture.check_block(block, prefix)
            _check_reachable(block, prefix)
            for leaf, linear in named_linears(block):
                plan._settle(f"{prefix}.{leaf}", linear)
        if config.lm_head_bits is not None:
            plan._settle(LM_HEAD, head_of(model))
        if not plan.group_sizes:
            name, reason = next(iter(plan.left_alone.items()), ("the list of blocks", "it is empty"))
            raise QuantizationError(f"nothing to quantize: every linear is left as it is ({name}: {reason})")
        return plan

    def _settle(self, name: str, linear: nn.Linear) -> None:
        self.in_features[name] = linear.in_features
        config = self.config
        size = config.group_size_for(name, linear.in_features)
        if not config.converts(name):
            self.left_alone[name] = "listed in modules_to_not_convert"
        elif size is None:
            smaller = "nor a smaller one " if config.indivisible == "smaller" else ""
            self.left_alone[name] = (
                f"group size {config.group_size} {smaller}does not divide {linear.in_features} inputs"
            )
        else:
            spec = LinearSpec.of(linear.weight, config.bits_for(name), size, config.zero_point)
            obstacle = get_format(config.version_for(name)).obstacle(spec)
            if obstacle is None:
                self.group_sizes[name] = size
                self.specs[name] = spec
            else:
                self.left_alone[name] = obstacle

    @property
    def shares_head(self) -> bool:
        """Whether the head is tied to the embeddings and has the same settings: then one set of codes serves both."""
        return self.tied and self.embeddings is not None and self.specs.get(LM_HEAD) == self.embeddings

    def block_name(self, index: int) -> str:
        """The full name of a decoder block."""
        return f"{self.architecture.blocks}.{index}"

    def with_bits(self, model: PreTrainedModel, bits: Mapping[str, int]) -> Plan:
        """The plan with other widths for some linears."""
        others = {name: width for name, width in bits.items() if width != self.config.bits}
        return Plan.of(model, replace(self.config, module_bits=others, target_bits=None))

    @property
    def groups(self) -> list[ScaleGroup]:
        """The groups whose scales this run searches."""
        if not self.config.apply_scale:
            return []
        return self.architecture.groups(self.model_config, self.config.scale_activations)

    @property
    def tunes(self) -> bool:
        """Whether blocks are tuned, on what the quantized blocks before them give."""
        return self.config.effort == "best"

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through a block together, at most (a longer sample goes alone)."""
        return _TUNING_TOKENS if self.tunes else _BATCH_TOKENS

    @property
    def group_sizes_of_blocks(self) -> set[int]:
        return {size for name, size in self.group_sizes.items() if name != LM_HEAD}

    @property
    def other_group_sizes(self) -> dict[str, int]:
        """The linears that got another group size than the config's."""
        return {name: size for name, size in self.group_sizes.items() if size != self.wanted_group_size(name)}

    def wanted_group_size(self, name: str) -> int:
        """The group size the config asks for, for a linear."""
        return self.config.lm_head_group_size if name == LM_HEAD else self.config.group_size

    def fake_quantize(self, name: str) -> awq.FakeQuantize:
        """The rounding of a linear."""
        bits, size = self.config.bits_for(name), self.group_sizes[name]
        return partial(fake_quantize, bits=bits, group_size=size, zero_point=self.config.zero_point)

    def group_errors(self, name: str) -> awq.GroupErrors:
        """What cutting and rounding the groups of a linear errs by."""
        return partial(search_ops.group_errors, bits=self.config.bits_for(name), zero_point=self.config.zero_point)

    def settled_config(self) -> QuantConfig:
        """The config with what the plan settled: linears left alone, other group sizes."""
        left_alone = tuple(dict.fromkeys([*self.config.modules_to_not_convert, *self.left_alone]))
        others = self.other_group_sizes
        config = replace(self.config, modules_to_not_convert=left_alone, module_group_sizes=others)
        sizes = self.group_sizes_of_blocks
        if len(sizes) == 1:
            # One size for all, even if not the one asked for, is what every engine can load.
            others = {name: size for name, size in others.items() if name == LM_HEAD}
            config = replace(config, group_size=sizes.pop(), module_group_sizes=others)
        return config

    def warn_of_surprises(self) -> None:
        """Says what the user may not expect of the result."""
        if self.tied and (self.embeddings is None) != (LM_HEAD not in self.specs):
            given, other = ("embedding", "lm_head") if self.embeddings is not None else ("lm_head", "embedding")
            warnings.warn(
                f"{given}_bits without {other}_bits: the head was tied to the embeddings, and now each is kept on its "
                f"own, which takes more memory than before. Give {other}_bits the same to share one quantized weight",
                stacklevel=4,
            )
        for pattern in self.config.modules_to_not_convert:
            if pattern not in "lm_head" and not any(pattern in name for name in self.in_features):
                warnings.warn(
                    f"modules_to_not_convert: no linear of the blocks has {pattern!r} in its name", stacklevel=4
                )
        if len(self.group_sizes_of_blocks) > 1:
            others = {name: size for name, size in self.other_group_sizes.items() if name != LM_HEAD}
            name, size = next(iter(others.items()))
            warnings.warn(
                f"the group size {self.config.group_size} does not divide the inputs of {len(others)} "
                f"linears, which got a smaller one ({name}: {size}). autoq loads such a checkpoint; engines with one "
                f'group size for all, such as vLLM, do not: for them choose group_size={size} or indivisible="skip".',
                stacklevel=4,
            )

    def warn_if_undercalibrated(self, report: QuantizationReport) -> None:
        """Fewer tokens than input channels leave directions of the input unseen: the search would trust noise."""
        widths = self.in_features
        starved = [entry for entry in report.quantized if entry.tokens < widths[entry.name]]
        if starved:
            worst = max(starved, key=lambda entry: widths[entry.name] / max(entry.tokens, 1))
            warnings.warn(
                f"too little calibration data: {len(starved)} of {len(report.quantized)} linears saw fewer tokens than "
                f"they have input channels ({worst.name}: {worst.tokens} tokens, {widths[worst.name]} channels); the "
                "scales are unreliable. Give more or longer samples (calib_data, max_calib_samples, "
                "max_calib_seq_len).",
                stacklevel=4,
            )


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The output head; raises QuantizationError where that is no linear."""
    head = model.get_submodule(LM_HEAD)
    if not isinstance(head, nn.Linear):
        raise QuantizationError(f"{LM_HEAD} is a {type(head).__name__}, not a linear; leave lm_head_bits out")
    return head


def name_of_embeddings(model: PreTrainedModel) -> str:
    """The full name of the token embeddings."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)


def embeddings_of(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """The name of the token embeddings, and them; raises QuantizationError where they are no plain embeddings."""
    name, embeddings = name_of_embeddings(model), model.get_input_embeddings()
    if type(embeddings) is not nn.Embedding:
        raise QuantizationError(f"{name} is a {type(embeddings).__name__}, not an Embedding; leave embedding_bits out")
    return name, embeddings


def _embeddings_spec(model: PreTrainedModel, config: QuantConfig) -> LinearSpec | None:
    if config.embedding_bits is None:
        return None
    name, embeddings = embeddings_of(model)
    left = next((pattern for pattern in config.modules_to_not_convert if pattern in name), None)
    if left is not None:
        raise ConfigError(f"{left!r} is in modules_to_not_convert, but embedding_bits asks to quantize {name}")
    size = config.group_size_for(EMBEDDINGS, embeddings.embedding_dim)
    if size is None:
        raise QuantizationError(
            f"{name} has {embeddings.embedding_dim} columns, which embedding_group_size={config.embedding_group_size} "
            "does not divide; give one that does, or -1 for a whole row"
        )
    return LinearSpec.of(embeddings.weight, config.embedding_bits, size, config.zero_point)


def _check_reachable(block: nn.Module, prefix: str) -> None:
    if is_offloaded(block):
        return
    for name, parameter in block.named_parameters():
        if parameter.is_meta:
            raise QuantizationError(
                f"the weight {prefix}.{name} is not in memory, nor is it known where it is; load the model again"
            )
