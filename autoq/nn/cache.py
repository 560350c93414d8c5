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
        keys, values = (like.new_empty(shape, dtype=dtype) for _ in range(2))
        if not quantized:
            return cls(keys, values)
        return cls(keys, values, *(like.new_empty(shape[:3], dtype=torch.float32) for _ in range(2)))

    def map(self, change: Callable[[Tensor], Tensor]) -> KVBuffers:
        """Every tensor changed."""
        return KVBuffers(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class KVLayer(DynamicLayer):
    """The keys and values of one block, `[batch, kv_heads, tokens, head_dim]`, at the front of larger buffers.

    transformers' own layer copies the whole cache at every token. Here a token is written where there is room; when
    there is none, the buffers are copied to some at least twice as large, so that a token is copied twice on average.

    quantized: the buffers are int8.
    """

    def __init__(self, quantized: bool = False) -> None:
        self.quantized = quantized
        self._buffers: KVBuffers | None = None
        self._length = 0
        super().__init__()

    def _front(self, tensor: Tensor, scales: Tensor | None) -> Tensor:
        front = tensor[:, :, : self._length]
        return front if scales is None else (front * scales[:, :, : self._length, None]).to(self.dtype)

    # transformers' layer assigns None to these, and nothing else here does.
    @property
    def keys(self) -> Tensor | None:
        buffers = self._buffers
        return None if buffers is None else self._front(buffers.keys, buffers.key_scales)

    @keys.setter
    def keys(self, _: Tensor | None) -> None:
        self._buffers = None

    @property
    def values(self) -> Tensor | None:
        buffers = self._buffers
        return None if buffers is None else self._front(buffers.values, buffers.value_scales)

    @values.setter
    def values(self, _: Tensor | None) -> None:
        self._buffers = None

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
        capacity = 0 if old is None else old.keys.shape[2]
        if old is None or capacity < length + tokens:
            capacity = -(-max(length + tokens, 2 * capacity) // _STEP) * _STEP
            self._buffers = KVBuffers.empty(like, (batch, heads, capacity, head_dim), self.quantized)
            for new, held in zip(self._buffers, old or (), strict=False):
                if new is not None and held is not None:
                    new[:, :, :length] = held[:, :, :length]
        assert self._buffers is not None
        return self._buffers, length

    def advance(self, tokens: int) -> None:
        """The buffers hold `tokens` more tokens."""
        self._length += tokens

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
        self._length = max(0, self._length - abs(tokens_to_remove))

    def reset(self) -> None:
        self._length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences in another order, some of them perhaps twice."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some of the sequences."""
        self._change(lambda tensor: tensor[indices])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffers is not None:
            self._buffers = self._buffers.map(change)


def kv_layer(cache: Any, index: int, quantized: bool = False) -> KVLayer | None:
    """The layer of a cache as a KVLayer, put in the place of transformers' growing layer if it is one; None for others.

    The layer of a sliding window is replaced while it is empty: ours keeps what is behind the window, and the mask that
    transformers then makes leaves it out. Static, quantized and offloaded caches have layers of their own, and blocks
    then run unfused.
    """
    if not isinstance(cache, Cache) or cache.offloading:
        return None
    layers = cache.layers
    if type(cache) is DynamicCache and cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(KVLayer(quantized) for _ in range(index + 1 - len(layers)))
    if index >= len(layers):
        return None
    layer = layers[index]
    if type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() == 0):
        layer = layers[index] = KVLayer.holding(layer, quantized)
    return layer if isinstance(layer, KVLayer) else None
