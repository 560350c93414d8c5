"""Runs the decoder blocks of a model in one native call each.

The modules of the model stay as transformers made them, with their names, their tensors and their hooks. Only the
forward of each block is replaced, by one that hands everything to the operator of `autoq.block_ops`. Whatever that
operator does not do (gradients, attention weights, hooks or adapters on a part of the block, caches of other kinds)
goes through the block's own forward, with the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoq.architectures import architecture_of, known_model_types
from autoq.architectures.base import DecoderBlock, RotaryKind
from autoq.block_ops import ActivationKind, BlockSettings, BlockTensors, decoder_block
from autoq.nn.activation import ScaledActivation
from autoq.nn.cache import KVBuffers, kv_layer
from autoq.nn.linear import QuantLinear
from autoq.ops import LANES, PackedWeight

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

    A block is left as it is when it is not on the CPU, when some of its linears are not quantized, or when projections
    that are read together cannot be one. So are the blocks of a model that is spread over devices.
    """
    if model.config.model_type not in known_model_types() or getattr(model, "hf_device_map", None) is not None:
        return 0
    architecture = architecture_of(model.config)
    description = architecture.block(model.config)
    table = _RotaryTable()
    fused = 0
    for block in architecture.decoder_blocks(model):
        parts = _Parts.of(block, description)
        if parts is not None:
            block.forward = FusedForward(block, parts, table, quantized_cache)
            fused += 1
    return fused


def unfuse_blocks(model: PreTrainedModel) -> None:
    """Gives every decoder block its own forward back."""
    for block in architecture_of(model.config).decoder_blocks(model):
        if isinstance(block.__dict__.get("forward"), FusedForward):
            del block.forward


class _Parts:
    """The modules of a block that the operator stands in for, and their tensors as it wants them."""

    def __init__(self, block: nn.Module, description: DecoderBlock) -> None:
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
        self._places = []
        for name in filter(None, names):
            parent, _, leaf = name.rpartition(".")
            self._places.append((block.get_submodule(parent)._modules, leaf, block.get_submodule(name)))

    @classmethod
    def of(cls, block: nn.Module, description: DecoderBlock) -> _Parts | None:
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
        if not all(isinstance(linear, QuantLinear) and linear.codes.is_cpu for linear in self.linears):
            return False
        return (
            self._activation_kind() is not None
            and _can_be_merged(self.qkv)
            and _can_be_merged(self.up)
            and sum(linear.out_features for linear in self.qkv) == self.description.heads.row_size
        )

    def untouched(self) -> bool:
        """Whether the modules are still those of the block, and nobody wants to see what goes in or out of them."""
        for siblings, leaf, module in self._places:
            if siblings.get(leaf) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
        return True

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
            int8=self.qkv[0].mode == "int8",
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


def _epsilon(norm: Any) -> float:
    return 0.0 if norm is None else float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _vectors(norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a norm, as far as it has them."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    return _NOTHING if weight is None else weight.detach(), _NOTHING if bias is None else bias.detach()


def _can_be_merged(linears: list[Any]) -> bool:
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
    merged = PackedWeight(*(torch.cat(parts) for parts in zip(*(linear.packed() for linear in linears), strict=True)))
    first = 0
    for linear in linears:
        last = first + linear.codes.shape[0]
        for name, tensor in zip(PackedWeight._fields, merged, strict=True):
            setattr(linear, name, tensor[first:last])
        first = last
    if like is None:
        return (*merged, _NOTHING)
    sizes = [linear.out_features for linear in linears]
    parts = [like.new_zeros(size) if bias is None else bias for size, bias in zip(sizes, biases, strict=True)]
    return (*merged, torch.cat(parts))


class _RotaryTable:
    """Cosines and sines of the tokens of one forward pass, looked up by the first block and used by all."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def at(self, positions: Tensor, embeddings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """embeddings: `[positions, sines | cosines]`, as GPT-J keeps them."""
        if self._tables is None or self._positions is not positions or self._tables[0].dtype != dtype:
            sines, cosines = embeddings.to(positions.device)[positions].to(dtype).chunk(2, dim=-1)
            self._positions, self._tables = positions, (cosines.contiguous(), sines.contiguous())
        return self._tables


class FusedForward:
    """The forward of a decoder block in one native call."""

    def __init__(self, block: nn.Module, parts: _Parts, table: _RotaryTable, quantized_cache: bool) -> None:
        self._block = block
        self._quantized_cache = quantized_cache
        self._unfused = block.forward
        self._parts = parts
        self._table = table
        settings = parts.settings()
        self._integers, self._constants = settings.integers(), settings.constants()
        self._collect()

    def _collect(self) -> None:
        """Takes the tensors from the modules."""
        tensors = self._parts.tensors()
        self._tensors = list(tensors)
        self._sources = [(linear._buffers, linear._buffers["codes"]) for linear in self._parts.linears]
        packed = {f"{linear}_{leaf}" for linear in ("qkv", "output", "up", "down") for leaf in PackedWeight._fields}
        vectors = {name: tensor for name, tensor in tensors._asdict().items() if name not in packed}
        self._dtypes = {vector.dtype for vector in vectors.values() if vector.numel()}

    def _holds(self, dtype: torch.dtype) -> bool:
        """Whether the tensors are those of the modules, in this dtype; takes them again after a move or conversion."""
        if self._dtypes <= {dtype} and all(buffers["codes"] is codes for buffers, codes in self._sources):
            return True
        if not self._parts.can_be_fused():
            return False
        self._collect()
        return self._dtypes <= {dtype}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = None if args else self._run(hidden_states, kwargs)
        if output is None:
            return self._unfused(hidden_states, *args, **kwargs)
        return (output, None) if self._parts.description.returns_tuple else output

    def _run(self, hidden: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The block's output, or None where its own forward has to make it."""
        if self._block.training or (torch.is_grad_enabled() and hidden.requires_grad) or torch.compiler.is_compiling():
            return None
        if options.get("output_attentions") or not self._parts.untouched() or not self._holds(hidden.dtype):
            return None
        description = self._parts.description
        heads = description.heads
        batch, tokens, _ = hidden.shape
        cache = options.get("past_key_values", options.get("layer_past"))
        layer, past = None, 0
        if cache is None:
            buffers = KVBuffers.empty(hidden, (batch, heads.kv_heads, tokens, heads.head_dim), self._quantized_cache)
        else:
            layer = kv_layer(cache, self._parts.attention.layer_idx, self._quantized_cache)
            if layer is None:
                return None
            buffers, past = layer.reserve(hidden, batch, heads.kv_heads, tokens, heads.head_dim)
        mask = options.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[3] != past + tokens):
            return None
        cosines, sines = self._rotary(hidden, options)
        output = decoder_block(
            hidden, *buffers, past, cosines, sines, mask, self._bias(options, batch, past + tokens),
            self._tensors, self._integers, self._constants,
        )  # fmt: skip
        if layer is not None:
            layer.advance(tokens)
        return output

    def _rotary(self, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        kind = self._parts.description.rotary
        if kind == RotaryKind.NONE:
            return None, None
        if kind == RotaryKind.PAIRS:
            return self._table.at(options["position_ids"], self._parts.attention.embed_positions, hidden.dtype)
        cosines, sines = options["position_embeddings"]
        return cosines, sines

    def _bias(self, options: dict[str, Any], batch: int, positions: int) -> Tensor | None:
        """What is added to the scores, `[batch or 1, heads, 1, positions]`."""
        name = self._parts.description.position_bias
        bias = None if name is None else options.get(name)
        if bias is None:
            return None
        bias = bias[:, :, -positions:]
        return bias.view(-1, self._parts.description.heads.heads, *bias.shape[1:])
