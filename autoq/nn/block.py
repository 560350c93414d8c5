"""Runs the decoder blocks of a model in one native call each.

The modules of the model stay as transformers made them, with their names, their tensors and their hooks. Only the
forward of each block is replaced, by one that hands everything to the operator of `autoq.block_ops`. Whatever that
operator does not do (gradients, attention weights, hooks or adapters on a part of the block, caches of other kinds)
goes through the block's own forward, with the same result. What is around the blocks goes with them
(`autoq.nn.around`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from autoq.architectures import architecture_of, known_model_types
from autoq.architectures.base import BlockParts, RotaryKind
from autoq.block_ops import (
    MAX_HEAD_DIM,
    QKV_CODES,
    ActivationKind,
    BlockSettings,
    BlockTensors,
    decoder_blocks,
    runs_on,
)
from autoq.nn.activation import ScaledActivation
from autoq.nn.around import fuse_around
from autoq.nn.cache import KVBuffers, kv_layer
from autoq.nn.held import HeldTensors
from autoq.nn.linear import DenseLinear, QuantLinear
from autoq.nn.spread import is_mover
from autoq.nn.stand_in import StandIn, is_plain_call
from autoq.ops import MODES
from autoq.packed import LANES, PackedWeight

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # another release of transformers: such a hook is then like any other
    _active_collector = None  # type: ignore[assignment]

# What the operator computes; others have rules of their own.
_ATTENTIONS = ("sdpa", "eager", None)

_ACTIVATIONS = {
    "ReLU": ActivationKind.RELU,
    "SiLU": ActivationKind.SILU,
    "SiLUActivation": ActivationKind.SILU,
    "GELU": ActivationKind.GELU,
    "GELUActivation": ActivationKind.GELU,
    "NewGELUActivation": ActivationKind.GELU_TANH,
    "GELUTanh": ActivationKind.GELU_TANH,
    "FastGELUActivation": ActivationKind.GELU_TANH,
    "BloomGelu": ActivationKind.GELU_TANH,
    "QuickGELUActivation": ActivationKind.QUICK_GELU,
}


def fuse_blocks(model: PreTrainedModel, quantized_cache: bool = False) -> int:
    """Replaces the forward of every decoder block that the fused operator can run; returns how many those are.

    quantized_cache: keys and values are kept in 8 bits.

    A block is left as it is when it is on a device without kernels, when its weights are on the disk, when some of its
    linears are not quantized, or when projections that are read together cannot be one. With the blocks go what is
    around them and the output head, if it is not quantized: it becomes a DenseLinear.
    """
    if model.config.model_type not in known_model_types():
        return 0
    unfuse_blocks(model)
    architecture = architecture_of(model.config)
    description = architecture.block(model.config)
    once = _OncePerPass()
    fused = 0
    for block in architecture.decoder_blocks(model):
        # A forward of the block's own instance is somebody else's: accelerate's, say.
        parts = None if "forward" in block.__dict__ else _Parts.of(block, description)
        if parts is not None:
            block.forward = FusedForward(block, model.config, parts, once, quantized_cache)
            fused += 1
    head = model.get_output_embeddings()
    if fused:
        fuse_around(model, architecture)
        if type(head) is nn.Linear:
            head.__class__ = DenseLinear
    return fused


def unfuse_blocks(model: PreTrainedModel) -> None:
    """Gives every decoder block, what is around them and the head their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), StandIn):
            del module.forward
    head: Any = model.get_output_embeddings()
    if type(head) is DenseLinear:
        head.__class__ = nn.Linear  # type: ignore[assignment]


def linears_read_together(model: PreTrainedModel) -> list[list[str]]:
    """The names of the quantized linears that fused blocks read as one weight, in its order."""
    if model.config.model_type not in known_model_types():
        return []
    architecture = architecture_of(model.config)
    description = architecture.block(model.config)
    modules = dict(model.named_modules())
    together = [
        [f"{architecture.blocks}.{index}.{leaf}" for leaf in leaves]
        for index in range(len(architecture.decoder_blocks(model)))
        for leaves in (description.qkv, description.up)
    ]
    return [names for names in together if _can_be_merged([modules.get(name) for name in names])]


class _Parts:
    """The modules of a block that the operator stands in for, and their tensors as it wants them."""

    def __init__(self, block: nn.Module, description: BlockParts) -> None:
        def part(name: str | None) -> Any:  # modules of many types, most of whose attributes have none
            return None if name is None else block.get_submodule(name)

        self.description = description
        self.attention = part(description.attention)
        self.attention_norm = part(description.attention_norm)
        self.qkv = [part(name) for name in description.qkv]
        self.output = part(description.attention_output)
        self.mlp_norm = part(description.mlp_norm)
        self.up = [part(name) for name in description.up]
        self.activation = part(description.activation)
        self.down = part(description.down)
        self.query_norm, self.key_norm = part(description.query_norm), part(description.key_norm)
        names = {
            description.attention, description.attention_norm, *description.qkv, description.attention_output,
            description.mlp_norm, *description.up, description.activation, description.down,
            description.down.rpartition(".")[0], description.query_norm, description.key_norm,
        }  # fmt: skip
        modules = [(name.rpartition("."), block.get_submodule(name)) for name in filter(None, names)]
        self._places = [(block.get_submodule(parent)._modules, leaf, module) for (parent, _, leaf), module in modules]
        self._hooks = [hooks for _, module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    @classmethod
    def of(cls, block: nn.Module, description: BlockParts) -> _Parts | None:
        """The parts of a block, or None if the operator cannot run it."""
        try:
            parts = cls(block, description)
        except AttributeError:  # a variant of the family without one of the parts
            return None
        return parts if parts.can_be_fused() else None

    @property
    def linears(self) -> list[Any]:
        return [*self.qkv, self.output, *self.up, self.down]

    def can_be_fused(self) -> bool:
        if not all(isinstance(linear, QuantLinear) for linear in self.linears):
            return False
        devices = {linear.codes.device for linear in self.linears}
        if len(devices) > 1 or not runs_on(devices.pop()):
            return False
        return (
            self._activation_kind() is not None
            and _can_be_merged(self.qkv)
            and _can_be_merged(self.up)
            and sum(linear.out_features for linear in self.qkv) == self.description.heads.row_size
            and self.description.heads.head_dim <= MAX_HEAD_DIM
        )

    def untouched(self) -> bool:
        """Whether the modules are still those of the block, and nobody watches or changes what goes through them."""
        if nn.modules.module._has_any_global_hook():
            return False
        if any(
            siblings.get(leaf) is not module or "forward" in module.__dict__ for siblings, leaf, module in self._places
        ):
            return False
        return not any(self._hooks) or not any(is_watched(module) for _, _, module in self._places)

    def sources(self) -> list[dict[str, Any]]:
        """The dicts of the modules where the tensors come from."""
        modules = [*self.linears, self.attention_norm, self.mlp_norm, self.activation, self.query_norm, self.key_norm]
        return [tensors for module in filter(None, modules) for tensors in (module._parameters, module._buffers)]

    def settings(self) -> BlockSettings:
        description, kind = self.description, self._activation_kind()
        assert kind is not None
        return BlockSettings(
            heads=description.heads,
            arrangement=description.arrangement,
            norm=description.norm,
            activation=kind,
            gated=len(self.up) == 2,
            intermediate=self.down.in_features,
            rotary=description.rotary,
            inverted_mask=description.inverted_mask,
            bits=(self.qkv[0].spec.bits, self.output.spec.bits, self.up[0].spec.bits, self.down.spec.bits),
            int8=False,
            epsilons=(_epsilon(self.attention_norm), _epsilon(self.mlp_norm), _epsilon(self.query_norm)),
            scale=description.scale or description.heads.head_dim**-0.5,
            clip=description.clip,
        )

    def tensors(self) -> BlockTensors:
        attention_norm, attention_norm_bias = _vectors(self.attention_norm)
        mlp_norm, mlp_norm_bias = _vectors(self.mlp_norm)
        return BlockTensors(
            attention_norm,
            attention_norm_bias,
            *_merge(self.qkv),
            *_merge([self.output]),
            mlp_norm,
            mlp_norm_bias,
            *_merge(self.up),
            *_merge([self.down]),
            activation_scales=self.activation.scales if isinstance(self.activation, ScaledActivation) else _NOTHING,
            query_norm=_vectors(self.query_norm)[0],
            key_norm=_vectors(self.key_norm)[0],
        )

    def _activation_kind(self) -> ActivationKind | None:
        module = self.activation.act if isinstance(self.activation, ScaledActivation) else self.activation
        if isinstance(module, nn.GELU) and module.approximate == "tanh":
            return ActivationKind.GELU_TANH
        return _ACTIVATIONS.get(type(module).__name__)


_NOTHING = torch.empty(0)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks see or change what goes through a module."""
    return not (
        all(is_mover(hook) for hook in module._forward_pre_hooks.values())
        and all(_is_idle(hook) for hook in module._forward_hooks.values())
    )


def _is_idle(hook: Any) -> bool:
    """Whether a forward hook is the one that transformers leaves on a model once attention weights were asked for, and
    they are not asked for now."""
    if _active_collector is None or getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    collected = _active_collector.get()
    return collected is None or "attentions" not in collected


def _epsilon(norm: Any) -> float:
    return 0.0 if norm is None else float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _vectors(norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a norm, as far as it has them."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    return _NOTHING if weight is None else weight.detach(), _NOTHING if bias is None else bias.detach()


def _can_be_merged(linears: list[Any]) -> bool:
    if not all(isinstance(linear, QuantLinear) for linear in linears):
        return False
    specs = [linear.spec for linear in linears]
    same = len({(spec.in_features, spec.bits, spec.group_size) for spec in specs}) == 1
    return same and all(spec.out_features % LANES == 0 for spec in specs[:-1])


def _merge(linears: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed weight of all the linears as one, and its bias.

    The linears become views of it, so that the codes stay the only copy.
    """
    biases = [linear.bias for linear in linears]
    like = next((bias for bias in biases if bias is not None), None)
    if len(linears) == 1:
        return (*linears[0].packed(), _NOTHING if like is None else like)
    merged = PackedWeight.joined([linear.packed() for linear in linears])
    sizes = [linear.out_features for linear in linears]
    for linear, part in zip(linears, merged.split(sizes), strict=True):
        linear.codes, linear.scales, linear.zeros = part
    if like is None:
        return (*merged, _NOTHING)
    parts = [like.new_zeros(size) if bias is None else bias for size, bias in zip(sizes, biases, strict=True)]
    return (*merged, torch.cat(parts))


class _OncePerPass:
    """What is made of a tensor of a forward pass: by the first block, for all of them."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, tuple[Any, ...], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}

    def __call__(self, source: Tensor, key: tuple[Any, ...], make: Callable[[Tensor], Any]) -> Any:
        """`make(source)`, or what it gave the last time, if that was for the same tensor and key."""
        if source.is_inference():  # whose changes cannot be seen
            return make(source)
        state = (source._version, source.data_ptr(), *key)
        last = self._last  # which another thread may replace at any time
        if last is None or last[0] is not source or last[1] != state:
            last = self._last = (source, state, make(source))
        return last[2]


class FusedForward(StandIn):
    """The forward of a decoder block in one native call."""

    def __init__(
        self,
        block: nn.Module,
        config: PretrainedConfig,
        parts: _Parts,
        once: _OncePerPass,
        quantized_cache: bool,
    ) -> None:
        super().__init__(block)
        self._config = config
        self._parts = parts
        self._once = once
        self._quantized_cache = quantized_cache
        settings = parts.settings()
        self._integers = {mode: replace(settings, int8=mode == "int8").integers() for mode in MODES}
        self._constants = settings.constants()
        self._collect()

    def __getstate__(self) -> dict[str, Any]:
        collected = ("_tensors", "_held", "_dtypes")
        return {name: value for name, value in super().__getstate__().items() if name not in collected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._collect()

    def _collect(self) -> None:
        """Takes the tensors from the modules, and remembers which these were."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._parts.tensors()
        self._tensors = list(tensors)
        read_anew = (tensor for linear in self._parts.linears for tensor in linear.packed())
        self._held = HeldTensors(self._parts.sources(), read_anew)
        packed = {f"{linear}_{leaf}" for linear in ("qkv", "output", "up", "down") for leaf in PackedWeight._fields}
        vectors = {name: tensor for name, tensor in tensors._asdict().items() if name not in packed}
        self._dtypes = {vector.dtype for vector in vectors.values() if vector.numel()}

    @property
    def tensors(self) -> list[Tensor]:
        """Those that the operator is given."""
        return self._tensors

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = None if args else self._run(hidden_states, kwargs)
        if output is None:
            return self.own(hidden_states, *args, **kwargs)
        return (output, None) if self._parts.description.returns_tuple else output

    def _run(self, hidden: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The block's output, or None where its own forward has to make it."""
        if not is_plain_call(hidden):
            return None
        if self.module.training or options.get("output_attentions") or not self._parts.untouched():
            return None
        if self._attention_implementation() not in _ATTENTIONS:
            return None
        if not self._held.are_current():
            if not self._parts.can_be_fused():
                return None
            self._collect()
        if not self._dtypes <= {hidden.dtype} or self._needs_gradients(hidden):
            return None
        if hidden.device != self._tensors[QKV_CODES].device:
            return None
        modes = {linear.mode for linear in self._parts.linears}
        if len(modes) > 1:
            return None
        description = self._parts.description
        heads = description.heads
        batch, tokens, _ = hidden.shape
        shape = (batch, heads.kv_heads, tokens, heads.head_dim)
        cache = options.get("past_key_values", options.get("layer_past"))
        layer, past, length = None, 0, None
        if cache is None:
            buffers = KVBuffers.empty(hidden, shape, self._quantized_cache)
        else:
            layer = kv_layer(cache, self._parts.attention.layer_idx, self._quantized_cache)
            if layer is None:
                return None
            buffers, past = layer.reserve(hidden, *shape)
            length = layer.length
        mask = options.get("attention_mask")
        if layer is not None and not layer.masked and getattr(self._config, "sliding_window", None) is None:
            mask = None  # while a GPU records, transformers makes one that says no more than the length
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[3] != past + tokens):
            return None
        cosines, sines = self._rotary(hidden, options)
        output = decoder_blocks(
            hidden, *buffers.as_lists(), past, cosines, sines, mask,
            self._bias(options, past + tokens, length is not None),
            self._tensors, self._integers[modes.pop()], self._constants, length,
        )  # fmt: skip
        if layer is not None:
            layer.advance(tokens)
        return output

    def _attention_implementation(self) -> Any:
        # Every attribute of a config is looked up through Python, which for all blocks takes half a millisecond.
        name = "_attn_implementation_internal"
        attributes = self._config.__dict__
        if name in attributes:
            return attributes[name]
        return self._config._attn_implementation

    def _needs_gradients(self, hidden: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return hidden.requires_grad or any(tensor.requires_grad for tensor in self._held.tensors)

    def _rotary(self, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        kind = self._parts.description.rotary
        if kind == RotaryKind.NONE:
            return None, None
        if kind == RotaryKind.PAIRS:
            table = self._parts.attention.embed_positions  # [positions, sines | cosines], as GPT-J keeps them

            def look_up(positions: Tensor) -> tuple[Tensor, Tensor]:
                sines, cosines = table.to(positions.device)[positions].to(hidden.dtype).chunk(2, dim=-1)
                return cosines.contiguous(), sines.contiguous()

            return self._once(options["position_ids"], ("rotary", hidden.dtype), look_up)
        cosines, sines = options["position_embeddings"]
        return cosines, sines

    def _bias(self, options: dict[str, Any], positions: int, static: bool) -> Tensor | None:
        """What is added to the scores, `[batch or 1, heads, 1, positions]`.

        static: the positions are the room of a cache, which may be more than the model has.
        """
        name = self._parts.description.position_bias
        bias = None if name is None else options.get(name)
        if bias is None:
            return None

        def cut(bias: Tensor) -> Tensor:
            bias = bias[:, :, -positions:]
            if static and bias.shape[2] < positions:
                bias = functional.pad(bias, (0, positions - bias.shape[2]))
            return bias.view(-1, self._parts.description.heads.heads, *bias.shape[1:])

        return self._once(bias, ("bias", positions, static), cut)
