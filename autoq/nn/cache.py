"""The key/value cache of the fused decoder blocks: transformers' cache, with room for the tokens to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from autoq.block_ops import write_cache

# Room is made for a multiple of this many tokens.
_STEP = 256


class KVBuffers(NamedTuple):
    """Keys and values `[batch, kv_heads, capacity, head_dim]` in the model's dtype; or int8, with fp32 scales
    `[batch, kv_heads, capacity]`, one for each position of a head."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, int, int, int], quantized: bool) -> KVBuffers:
        """Room for keys and values of this shape, on the device of `like`, in its dtype unless quantized."""
        dtype = torch.int8 if quantized else like.dtype
        with torch.inference_mode(False):  # a cache filled there may be used outside
            keys, values = (torch.empty(shape, dtype=dtype, device=like.device) for _ in range(2))
            if not quantized:
                return cls(keys, values)
            scales = (torch.empty(shape[:3], dtype=torch.float32, device=like.device) for _ in range(2))
        return cls(keys, values, *scales)

    def map(self, change: Callable[[Tensor], Tensor]) -> KVBuffers:
        """Every tensor changed."""
        with torch.inference_mode(False):
            return KVBuffers(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]

    def as_lists(self) -> list[list[Tensor]]:
        """Keys, values and their scales, as the operator of the blocks wants them."""
        return [[] if tensor is None else [tensor] for tensor in self]

    @property
    def capacity(self) -> int:
        return min(self.keys.shape[2], self.values.shape[2])


class KVLayer(DynamicLayer):
    """The keys and values of one block, `[batch, kv_heads, tokens, head_dim]`, at the front of larger buffers.

    transformers' own layer copies the whole cache at every token. Here a token is written where there is room; when
    there is none, the buffers are copied to some at least twice as large, so that a token is copied twice on average.

    quantized: the buffers are int8.
    """

    length: Tensor | None = None  # where it is found on the device, of a layer whose length the host does not know
    masked = True  # whether a mask may say more than the order of the positions and how many are filled

    def __init__(self, quantized: bool = False) -> None:
        self.quantized = quantized
        self._buffers: KVBuffers | None = None
        self._length = 0
        self._lent = False  # the buffers may be filled by others once this layer is gone
        super().__init__()

    def _front(self, tensor: Tensor, scales: Tensor | None) -> Tensor:
        front = tensor[:, :, : self._length]
        return front if scales is None else (front * scales[:, :, : self._length, None]).to(self.dtype)

    def _own(self, front: Tensor) -> Tensor:
        return front.clone() if self._lent else front

    def _assign(self, name: str, states: Tensor | None) -> None:
        """What an assignment to `keys` or `values` does: nothing else is held then, so both have to be assigned."""
        if states is None:
            self._buffers, self._length, self._lent = None, 0, False
            return
        fresh = KVBuffers.empty(states, tuple(states.shape), self.quantized)  # type: ignore[arg-type]
        write_cache(fresh.keys, fresh.key_scales, 0, states)
        if self._buffers is None:
            self.lazy_initialization(states, states)
            self._buffers = fresh
        if name == "keys":
            self._buffers = self._buffers._replace(keys=fresh.keys, key_scales=fresh.key_scales)
        else:
            self._buffers = self._buffers._replace(values=fresh.keys, value_scales=fresh.key_scales)
        self._length = states.shape[2]

    @property
    def keys(self) -> Tensor | None:
        buffers = self._buffers
        return None if buffers is None else self._own(self._front(buffers.keys, buffers.key_scales))

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._assign("keys", states)

    @property
    def values(self) -> Tensor | None:
        buffers = self._buffers
        return None if buffers is None else self._own(self._front(buffers.values, buffers.value_scales))

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._assign("values", states)

    @classmethod
    def holding(cls, layer: DynamicLayer, quantized: bool = False) -> KVLayer:
        """A layer with what transformers' layer holds."""
        own = cls(quantized)
        if layer.keys is not None and layer.values is not None and layer.get_seq_length() > 0:
            own.update(layer.keys, layer.values)
        return own

    def reserve(self, like: Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[KVBuffers, int]:
        """Makes room for `tokens` more tokens, in the dtype of `like`.

        Returns the buffers and how many tokens they hold; the new ones belong behind these, and `advance` has to be
        called once they are there.
        """
        old, length = self._buffers, self._length
        if old is None:
            self.lazy_initialization(like, like)
        elif old.keys.shape[:2] != (batch, heads) or old.keys.shape[3] != head_dim:
            raise ValueError(
                f"the cache holds keys of the shape {list(old.keys.shape)} [batch, heads, room, head_dim], but those "
                f"to come have {[batch, heads, tokens, head_dim]}; use a cache of its own for every batch"
            )
        if old is None or old.capacity < length + tokens:
            # A prompt is followed by a token, at least.
            room = -(-max(length + tokens + 1, 2 * (0 if old is None else old.capacity)) // _STEP) * _STEP
            self._lent = False
            self._buffers = KVBuffers.empty(like, (batch, heads, room, head_dim), self.quantized)
            for new, held in zip(self._buffers, old or (), strict=False):
                if new is not None and held is not None:
                    new[:, :, :length] = held[:, :, :length]
        assert self._buffers is not None
        return self._buffers, length

    def advance(self, tokens: int) -> None:
        """The buffers hold `tokens` more tokens."""
        self._length += tokens

    def make_room(self, tokens: int) -> None:
        """Room for so many more tokens, of a layer that holds some."""
        assert self._buffers is not None
        if self._buffers.capacity < self._length + tokens:
            batch, heads, _, head_dim = self._buffers.keys.shape
            self.reserve(torch.empty(0, dtype=self.dtype, device=self.device), batch, heads, tokens, head_dim)

    # ---- buffers at a fixed address, which layers take over from each other (steps.py) ----

    def holds(self, buffers: KVBuffers) -> bool:
        return self._buffers is buffers

    def holds_sequences(self, batch: int) -> bool:
        return self._buffers is not None and self._buffers.keys.shape[0] == batch

    def lend(self) -> KVBuffers:
        """The buffers, for others to fill once this layer is gone: what is given out from now on are copies."""
        assert self._buffers is not None
        self._lent = True
        return self._buffers

    def fits(self, buffers: KVBuffers) -> bool:
        """Whether what is held could move to other buffers."""
        assert self._buffers is not None
        return all(
            (own is None) == (other is None) and (own is None or other is None or _likeness(own) == _likeness(other))
            for own, other in zip(self._buffers, buffers, strict=True)
        )

    def move_to(self, buffers: KVBuffers) -> None:
        """Copies what is held to other buffers, which are not its own, and holds these from now on."""
        assert self._buffers is not None
        for old, new in zip(self._buffers, buffers, strict=True):
            if old is not None and new is not None:
                new[:, :, : self._length].copy_(old[:, :, : self._length])
        self._buffers, self._lent = buffers, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values `[batch, kv_heads, tokens, head_dim]`; returns all."""
        batch, heads, tokens, head_dim = key_states.shape
        buffers, length = self.reserve(key_states, batch, heads, tokens, head_dim)
        write_cache(buffers.keys, buffers.key_scales, length, key_states)
        write_cache(buffers.values, buffers.value_scales, length, value_states)
        self.advance(tokens)
        return self._front(buffers.keys, buffers.key_scales), self._front(buffers.values, buffers.value_scales)

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, given as a negative number as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        self._length = max(0, self._length - abs(tokens_to_remove))

    def reset(self) -> None:
        self._buffers, self._length, self._lent, self.is_initialized = None, 0, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences in another order, some of them perhaps twice."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some of the sequences."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffers is None:
            return
        if self._lent:
            # As many sequences as before stay where they are, which spares moving there before the next step.
            fronts = [tensor[:, :, : self._length] for tensor in self._buffers if tensor is not None]
            changed = [change(front) for front in fronts]
            if all(new.shape == front.shape for new, front in zip(changed, fronts, strict=True)):
                for front, new in zip(fronts, changed, strict=True):
                    front.copy_(new)
                return
        self._buffers, self._lent = self._buffers.map(change), False


def _likeness(tensor: Tensor) -> tuple[Any, ...]:
    """All but the room."""
    return tensor.shape[:2], tensor.shape[3:], tensor.dtype, tensor.device


def kv_layer(cache: Any, index: int, quantized: bool = False) -> KVLayer | None:
    """The layer of a cache as a KVLayer, put in the place of transformers' growing layer if it is one; None for others.

    The layers of sliding windows are replaced while they are empty, all at once, since masks are made for all by the
    size of one: ours keep what is behind the window, and the masks then leave it out. Static, quantized, offloaded and
    custom caches have layers of their own, and blocks then run unfused.
    """
    if not isinstance(cache, Cache) or cache.offloading:
        return None
    layers: list[Any] = cache.layers
    if index < len(layers) and isinstance(layers[index], KVLayer):
        return layers[index]
    if type(cache) is not DynamicCache:
        return None
    if cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(DynamicLayer() for _ in range(index + 1 - len(layers)))
    if index >= len(layers) or not all(_can_be_replaced(layer) for layer in layers):
        return None
    layers[:] = [layer if isinstance(layer, KVLayer) else KVLayer.holding(layer, quantized) for layer in layers]
    return layers[index]


def _can_be_replaced(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.get_seq_length() == 0
    return type(layer) in (DynamicLayer, KVLayer)
