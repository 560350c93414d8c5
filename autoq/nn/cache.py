"""The key/value cache of the fused decoder blocks: transformers' cache, with room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Room is made for a multiple of this many tokens.
_STEP = 256


class KVLayer(DynamicLayer):
    """The keys and values of one block, `[batch, kv_heads, tokens, head_dim]`, at the front of a larger buffer.

    transformers' own layer copies the whole cache at every token. Here a token is written where there is room; when
    there is none, the buffer is copied to one at least twice as large, so that each token is copied twice on average.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] | None = None  # keys, values
        self._length = 0
        super().__init__()

    def _front(self, index: int) -> Tensor | None:
        return None if self._buffers is None else self._buffers[index][:, :, : self._length]

    def _set_front(self, index: int, tensor: Tensor | None) -> None:
        if tensor is None or tensor.ndim != 4:  # an empty layer
            self._buffers, self._length = None, 0
            return
        if self._buffers is None:
            self._buffers = [tensor, tensor]
        self._buffers[index] = tensor.contiguous()
        self._length = tensor.shape[2]

    # The methods of transformers' layer that select or reorder sequences assign these two.
    @property
    def keys(self) -> Tensor | None:
        return self._front(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._set_front(0, tensor)

    @property
    def values(self) -> Tensor | None:
        return self._front(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._set_front(1, tensor)

    @classmethod
    def holding(cls, layer: DynamicLayer) -> KVLayer:
        """A layer with what transformers' layer holds."""
        own = cls()
        if layer.keys is not None and layer.values is not None and layer.get_seq_length() > 0:
            own.lazy_initialization(layer.keys, layer.values)
            own.keys, own.values = layer.keys, layer.values
        return own

    def reserve(self, like: Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor, int]:
        """Makes room for `tokens` more tokens, in the dtype of `like`.

        Returns the buffers `[batch, kv_heads, capacity, head_dim]` and how many tokens they hold; the new ones belong
        behind these, and `advance` has to be called once they are there.
        """
        length, needed = self._length, self._length + tokens
        if self._buffers is None:
            self.dtype, self.device = like.dtype, like.device
            self.is_initialized = True
        if self._buffers is None or self._buffers[0].shape[2] < needed:
            held = 0 if self._buffers is None else self._buffers[0].shape[2]
            capacity = -(-max(needed, 2 * held) // _STEP) * _STEP
            grown = [like.new_empty(batch, heads, capacity, head_dim) for _ in range(2)]
            for new, old in zip(grown, self._buffers or (), strict=False):
                new[:, :, :length] = old[:, :, :length]
            self._buffers = grown
        return self._buffers[0], self._buffers[1], length

    def advance(self, tokens: int) -> None:
        """The buffers hold `tokens` more tokens."""
        self._length += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values `[batch, kv_heads, tokens, head_dim]`; returns all."""
        batch, heads, tokens, head_dim = key_states.shape
        keys, values, length = self.reserve(key_states, batch, heads, tokens, head_dim)
        keys[:, :, length : length + tokens] = key_states
        values[:, :, length : length + tokens] = value_states
        self.advance(tokens)
        return keys[:, :, : self._length], values[:, :, : self._length]

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, given as a negative number as transformers does."""
        self._length = max(0, self._length - abs(tokens_to_remove))

    def reset(self) -> None:
        self._length = 0


def kv_layer(cache: Any, index: int) -> KVLayer | None:
    """The layer of a cache as a KVLayer, put in the place of transformers' growing layer if it is one; None for others.

    The layer of a sliding window is replaced while it is empty: ours keeps what is behind the window, and the mask that
    transformers then makes leaves it out. Static, quantized and offloaded caches have layers of their own, and blocks
    then run unfused.
    """
    if not isinstance(cache, Cache) or cache.offloading:
        return None
    layers = cache.layers
    if type(cache) is DynamicCache and cache.layer_class_to_replicate is DynamicLayer:
        layers.extend(KVLayer() for _ in range(index + 1 - len(layers)))
    if index >= len(layers):
        return None
    layer = layers[index]
    if type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() == 0):
        layer = layers[index] = KVLayer.holding(layer)
    return layer if isinstance(layer, KVLayer) else None


def new_buffers(like: Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values, `[batch, kv_heads, tokens, head_dim]` each, of one call without a cache."""
    return like.new_empty(batch, heads, tokens, head_dim), like.new_empty(batch, heads, tokens, head_dim)
