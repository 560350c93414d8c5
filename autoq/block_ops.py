"""The operator that runs decoder blocks of any family: its schema, its reference in plain torch and its fake.

A block is what csrc/block.cpp says: norm, q/k/v in one projection, attention over a cache, output projection, norm, MLP
and residuals. What families differ in is given as numbers, so that one operator serves them all; `BlockSettings` names
them. The tensors come as one list, in the order of `BlockTensors`; one that is absent is an empty tensor.

Blocks that follow each other and share all else run in one call: each has its keys, its values and, where the cache is
of 8 bits, their scales; tensors, settings and constants are those of all of them, one block after the other.

`past` is how many positions the caches hold. Where a step is recorded once and run again for every token, as CUDA
graphs are, that number has to come from the device: `length`, one int64, is then what counts, and `past` the most it
may be. The mask and the bias have `past + tokens` positions in either case.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autoq.architectures.base import Arrangement, HeadLayout, NormKind, RotaryKind
from autoq.errors import OperatorError
from autoq.extension import extension_missing
from autoq.model_ops import normalize
from autoq.ops import linear
from autoq.packed import PackedWeight

MAX_HEAD_DIM = 1024  # of the native operator


class ActivationKind(IntEnum):
    RELU = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    QUICK_GELU = 4


class BlockTensors(NamedTuple):
    """The tensors of a block in the order of the operator; linears as in `PackedWeight`, with their bias."""

    attention_norm: Tensor
    attention_norm_bias: Tensor
    qkv_codes: Tensor
    qkv_scales: Tensor
    qkv_zeros: Tensor
    qkv_bias: Tensor
    output_codes: Tensor
    output_scales: Tensor
    output_zeros: Tensor
    output_bias: Tensor
    mlp_norm: Tensor
    mlp_norm_bias: Tensor
    up_codes: Tensor
    up_scales: Tensor
    up_zeros: Tensor
    up_bias: Tensor
    down_codes: Tensor
    down_scales: Tensor
    down_zeros: Tensor
    down_bias: Tensor
    activation_scales: Tensor
    query_norm: Tensor
    key_norm: Tensor


QKV_CODES = BlockTensors._fields.index("qkv_codes")


@dataclass(frozen=True)
class BlockSettings:
    """What a block is beside its tensors.

    gated: the up projection gives `[gate | up]`, and the activation of the gate multiplies up.
    intermediate: features between the up and the down projection.
    inverted_mask: a boolean mask is true where a query must not look, rather than where it may.
    bits: of q/k/v, output, up and down projection.
    epsilons: of the attention norm, the MLP norm and the norms of query and key heads.
    int8: whether the linears of many rows run in the mode "int8" of `autoq.ops.linear`.
    scale: factor of the attention scores.
    clip: q, k and v are cut to [-clip, clip]; 0: they are not.
    """

    heads: HeadLayout
    arrangement: Arrangement
    norm: NormKind
    activation: ActivationKind
    gated: bool
    intermediate: int
    rotary: RotaryKind
    inverted_mask: bool
    bits: tuple[int, int, int, int]
    int8: bool
    epsilons: tuple[float, float, float]
    scale: float
    clip: float

    def integers(self) -> list[int]:
        """The whole-number settings, in the order of the operator."""
        return [
            *self.heads, int(self.arrangement), int(self.norm), int(self.activation), int(self.gated),
            self.intermediate, int(self.rotary), int(self.inverted_mask), *self.bits, int(self.int8),
        ]  # fmt: skip

    def constants(self) -> list[float]:
        """The others, in the order of the operator."""
        return [*self.epsilons, self.scale, self.clip]

    @classmethod
    def of(cls, integers: list[int], constants: list[float]) -> BlockSettings:
        """The inverse of `integers` and `constants`."""
        heads, rest = HeadLayout(*integers[:8]), integers[8:]
        return cls(
            heads, Arrangement(rest[0]), NormKind(rest[1]), ActivationKind(rest[2]), bool(rest[3]), rest[4],
            RotaryKind(rest[5]), bool(rest[6]), (rest[7], rest[8], rest[9], rest[10]), bool(rest[11]),
            (constants[0], constants[1], constants[2]), constants[3], constants[4],
        )  # fmt: skip


_FORBIDDEN = -1e30  # added to the score of a position that a boolean mask leaves out

_library = torch.library.Library("autoq", "FRAGMENT")
_library.define(
    "decoder_blocks(Tensor hidden, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!)[] key_scales, "
    "Tensor(d!)[] value_scales, int past, Tensor? cosines, Tensor? sines, Tensor? mask, Tensor? bias, "
    "Tensor[] tensors, int[] settings, float[] constants, Tensor? length=None) -> Tensor"
)


# ---- the reference ---------------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor, kind: NormKind, epsilon: float) -> Tensor:
    return normalize(x, weight if weight.numel() else None, bias if bias.numel() else None, kind, epsilon)


def _project(
    x: Tensor, tensors: BlockTensors, settings: BlockSettings, name: str, bits: int, out_features: int
) -> Tensor:
    packed = PackedWeight(*(getattr(tensors, f"{name}_{leaf}") for leaf in PackedWeight._fields))
    bias = getattr(tensors, f"{name}_bias")
    mode = "int8" if settings.int8 else "exact"
    return linear(x, packed, bias if bias.numel() else None, bits, out_features, mode)


def _activate(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == ActivationKind.RELU:
        return functional.relu(x)
    if kind == ActivationKind.SILU:
        return functional.silu(x)
    if kind == ActivationKind.QUICK_GELU:
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if kind == ActivationKind.GELU_TANH else "none")


def _rotate(x: Tensor, kind: RotaryKind, cosines: Tensor | None, sines: Tensor | None) -> Tensor:
    """Turns heads `[batch, tokens, heads, head_dim]`, fp32, by their positions."""
    if kind == RotaryKind.NONE:
        return x
    assert cosines is not None
    assert sines is not None
    angles = cosines.shape[-1] // 2 if kind == RotaryKind.HALVES else cosines.shape[-1]
    cos, sin = (table[:, :, None, :angles].float() for table in (cosines, sines))
    turned, rest = x[..., : 2 * angles], x[..., 2 * angles :]
    if kind == RotaryKind.HALVES:
        first, second = turned[..., :angles], turned[..., angles:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
    first, second = turned[..., ::2], turned[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pairs.flatten(-2), rest), -1)


def _heads(qkv: Tensor, starts: list[int], head_dim: int) -> Tensor:
    """The heads that start at these columns, `[batch, tokens, heads, head_dim]` in fp32."""
    columns = torch.tensor(starts, device=qkv.device)[:, None] + torch.arange(head_dim, device=qkv.device)
    return qkv[:, :, columns.flatten()].unflatten(-1, (len(starts), head_dim)).float()


def _score_term(tensor: Tensor, inverted: bool) -> Tensor:
    if tensor.dtype != torch.bool:
        return tensor.float()
    return torch.zeros_like(tensor, dtype=torch.float32).masked_fill(tensor if inverted else ~tensor, _FORBIDDEN)


def write_cache(cache: Tensor, scales: Tensor | None, past: int, states: Tensor) -> None:
    """Puts keys or values `[batch, heads, tokens, head_dim]` behind the first `past` positions of a cache.

    scales: None, or fp32 `[batch, heads, capacity]` of an int8 cache: each head of each position gets one.
    """
    end = past + states.shape[2]
    if scales is None:
        cache[:, :, past:end] = states
        return
    wide = states.float()
    scale = wide.abs().amax(-1) / 127
    scales[:, :, past:end] = scale
    cache[:, :, past:end] = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)


def _read_cache(cache: Tensor, scales: Tensor | None, seen: int) -> Tensor:
    wide = cache[:, :, :seen].float()
    return wide if scales is None else wide * scales[:, :, :seen, None]


class _Cache(NamedTuple):
    """Of a block."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    past: int


class _Terms(NamedTuple):
    """What is known of the positions."""

    cosines: Tensor | None
    sines: Tensor | None
    mask: Tensor | None
    bias: Tensor | None


def _attend(qkv: Tensor, cache: _Cache, terms: _Terms, tensors: BlockTensors, settings: BlockSettings) -> Tensor:
    keys, values, key_scales, value_scales, past = cache
    cosines, sines, mask, bias = terms
    layout = settings.heads
    batch, tokens, _ = qkv.shape
    seen = past + tokens
    if settings.clip:
        qkv = qkv.clamp(-settings.clip, settings.clip)
    q = _heads(qkv, [layout.query(h) for h in range(layout.heads)], layout.head_dim)
    k = _heads(qkv, [layout.key(g) for g in range(layout.kv_heads)], layout.head_dim)
    v = _heads(qkv, [layout.value(g) for g in range(layout.kv_heads)], layout.head_dim)
    nothing = qkv.new_empty(0)
    if tensors.query_norm.numel():
        q = _norm(q, tensors.query_norm, nothing, NormKind.RMS, settings.epsilons[2])
    if tensors.key_norm.numel():
        k = _norm(k, tensors.key_norm, nothing, NormKind.RMS, settings.epsilons[2])
    q, k = (_rotate(x, settings.rotary, cosines, sines) for x in (q, k))
    shared = layout.heads // layout.kv_heads
    write_cache(keys, key_scales, past, k.transpose(1, 2))
    write_cache(values, value_scales, past, v.transpose(1, 2))
    all_keys = _read_cache(keys, key_scales, seen).repeat_interleave(shared, 1)
    all_values = _read_cache(values, value_scales, seen).repeat_interleave(shared, 1)
    scores = q.transpose(1, 2) @ all_keys.transpose(2, 3) * settings.scale
    if bias is not None:
        scores = scores + _score_term(bias, False)
    if mask is not None:
        scores = scores + _score_term(mask, settings.inverted_mask)
    else:  # a mask says all that a query may look at; without one it may look back
        future = torch.ones(tokens, seen, dtype=torch.bool, device=qkv.device).triu(past + 1)
        scores = scores.masked_fill(future, -math.inf)
    nowhere = (scores < _FORBIDDEN / 2).all(
        -1, keepdim=True
    )  # what a padding token sees does not matter, but NaN would
    weights = scores.softmax(-1).masked_fill(nowhere, 0)
    return (weights @ all_values).transpose(1, 2).reshape(batch, tokens, -1).to(qkv.dtype)


def _mlp(x: Tensor, tensors: BlockTensors, settings: BlockSettings) -> Tensor:
    width = settings.intermediate
    up = _project(x, tensors, settings, "up", settings.bits[2], 2 * width if settings.gated else width)
    active = _activate(up[..., :width].float(), settings.activation)
    if settings.gated:
        active = active * up[..., width:].float()
    if tensors.activation_scales.numel():
        active = active / tensors.activation_scales.float()
    return _project(active.to(x.dtype), tensors, settings, "down", settings.bits[3], x.shape[-1])


def _reference(
    hidden: Tensor, keys: list[Tensor], values: list[Tensor], key_scales: list[Tensor], value_scales: list[Tensor],
    past: int, cosines: Tensor | None, sines: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    tensors: list[Tensor], settings: list[int], constants: list[float], length: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if length is not None:
        held = int(length)
        if not 0 <= held <= past:
            raise OperatorError(
                f"the length is {held} but must be between 0 and {past}, the past it stands for at most"
            )
        past, positions = held, held + hidden.shape[1]
        mask, bias = (term if term is None else term[..., :positions] for term in (mask, bias))
    blocks = zip(*(_cut(values, len(keys)) for values in (tensors, settings, constants)), strict=True)
    for i, (parts, integers, others) in enumerate(blocks):
        key_scale, value_scale = (scales[i] if scales else None for scales in (key_scales, value_scales))
        cache = _Cache(keys[i], values[i], key_scale, value_scale, past)
        chosen = BlockSettings.of(integers, others)
        hidden = _run_block(hidden, cache, _Terms(cosines, sines, mask, bias), BlockTensors(*parts), chosen)
    return hidden


def _cut(values: Sequence[Any], parts: int) -> list[list[Any]]:
    """What belongs to each of so many blocks."""
    if parts == 0 or len(values) % parts:
        raise OperatorError(f"{len(values)} tensors or settings cannot be those of {parts} blocks; give each its own")
    size = len(values) // parts
    return [list(values[i * size : (i + 1) * size]) for i in range(parts)]


def _run_block(hidden: Tensor, cache: _Cache, terms: _Terms, parts: BlockTensors, chosen: BlockSettings) -> Tensor:
    def norm(x: Tensor, name: str, epsilon: float) -> Tensor:
        return _norm(x, getattr(parts, name), getattr(parts, f"{name}_bias"), chosen.norm, epsilon)

    def attention(x: Tensor) -> Tensor:
        qkv = _project(x, parts, chosen, "qkv", chosen.bits[0], chosen.heads.row_size)
        mixed = _attend(qkv, cache, terms, parts, chosen)
        return _project(mixed, parts, chosen, "output", chosen.bits[1], hidden.shape[-1])

    def total(*summands: Tensor) -> Tensor:
        return torch.stack([summand.float() for summand in summands]).sum(0).to(hidden.dtype)

    first, second, _ = chosen.epsilons
    if chosen.arrangement == Arrangement.POST_NORM:
        middle = norm(total(hidden, attention(hidden)), "attention_norm", first)
        return norm(total(middle, _mlp(middle, parts, chosen)), "mlp_norm", second)
    normed = norm(hidden, "attention_norm", first)
    attended = attention(normed)
    if chosen.arrangement == Arrangement.PARALLEL:
        own = norm(hidden, "mlp_norm", second) if parts.mlp_norm.numel() else normed
        return total(hidden, attended, _mlp(own, parts, chosen))
    on_normed = chosen.arrangement == Arrangement.NORMED_RESIDUAL
    middle = total(normed if on_normed else hidden, attended)
    own = norm(middle, "mlp_norm", second)
    return total(own if on_normed else middle, _mlp(own, parts, chosen))


def _fake(
    hidden: Tensor, keys: list[Tensor], values: list[Tensor], key_scales: list[Tensor], value_scales: list[Tensor],
    past: int, cosines: Tensor | None, sines: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    tensors: list[Tensor], settings: list[int], constants: list[float], length: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


_library.impl("decoder_blocks", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("autoq::decoder_blocks", _fake, lib=_library)


def runs_on(device: torch.device) -> bool:
    """Whether blocks are faster through the operator there: on the CPU, and on others where it has kernels."""
    if device.type == "cpu":
        return True
    key = {"cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("autoq::decoder_blocks", key)


reference_decoder_blocks = _reference
decoder_blocks = torch.ops.autoq.decoder_blocks.default

# The places of the arguments that blocks of a call have in common; the others are lists, of one block after another.
SHARED_ARGUMENTS = tuple(
    i for i, argument in enumerate(decoder_blocks._schema.arguments) if not isinstance(argument.type, torch.ListType)
)


class KeptBlocks:
    """`decoder_blocks` of the same blocks and caches for one step after another, on the CPU.

    The native operator looks their tensors up and checks them once, and keeps the memory of the activations. The
    tensors must stay where they are. One thread at a time may call it.
    """

    def __init__(self, *arguments: Any) -> None:
        """arguments: those of a call of `decoder_blocks`; hidden states to come have the same shape and dtype."""
        hidden, keys, values, key_scales, value_scales, past, _, _, _, _, tensors, settings, constants, *_ = arguments
        self.count = len(keys)
        self._number: int = torch.ops.autoq.keep_decoder_blocks.default(
            hidden, keys, values, key_scales, value_scales, past, tensors, settings, constants
        )
        weakref.finalize(self, torch.ops.autoq.drop_decoder_blocks.default, self._number)

    @staticmethod
    def can_be_made(arguments: Sequence[Any]) -> bool:
        """Whether the native operator is there, and reads the tensors where they are."""
        hidden, tensors = arguments[0], arguments[10]
        native = hidden.device.type == "cpu" and extension_missing() is None
        return native and all(tensor.is_contiguous() for tensor in tensors)

    def __call__(
        self, hidden: Tensor, cosines: Tensor | None, sines: Tensor | None, mask: Tensor | None, bias: Tensor | None,
        length: Tensor | None,
    ) -> Tensor:  # fmt: skip
        output: Tensor = torch.ops.autoq.kept_decoder_blocks.default(
            hidden, self._number, cosines, sines, mask, bias, length
        )
        return output

    @staticmethod
    def changing(arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Of the arguments of a call of `decoder_blocks` those that a call of this takes."""
        hidden, _, _, _, _, _, cosines, sines, mask, bias, _, _, _, *length = arguments
        return (hidden, cosines, sines, mask, bias, length[0] if length else None)
