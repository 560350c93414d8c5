"""The key/value cache on its own: it does what transformers' own layer does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from autoq.nn.cache import KVLayer


def test_cache_layer_behaves_as_transformers_own() -> None:
    torch.manual_seed(0)
    caches = [DynamicCache(), DynamicCache()]
    caches[1].layers.append(KVLayer())
    for step, tokens in enumerate((3, 1, 300, 1, 700, 1)):
        keys, values = torch.randn(2, 2, 3, tokens, 8)
        results = [cache.update(keys, values, 0) for cache in caches]
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        for cache in caches:
            if step == 1:
                cache.reorder_cache(torch.tensor([1, 1]))
            if step == 2:
                cache.crop(-5)
            if step == 3:
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, 3]))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        assert caches[0].get_mask_sizes(4, 0) == caches[1].get_mask_sizes(4, 0)
    for cache in caches:
        cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    for ours, theirs in zip(*(cache.update(keys[:1], values[:1], 0) for cache in caches), strict=True):
        assert torch.equal(ours, theirs)
    for cache in caches:
        with pytest.raises(ValueError, match="negative"):
            cache.crop(5)
        cache.reset()
        assert cache.get_seq_length() == 0
        cache.update(keys[:1], values[:1], 0)
    with pytest.raises(ValueError, match="use a cache of its own for every batch"):
        caches[1].update(keys, values, 0)


def test_cache_grows_rarely() -> None:
    layer = KVLayer()
    addresses = set()
    for _ in range(2000):
        buffers, _ = layer.reserve(torch.empty(0), 1, 2, 1, 8)
        layer.advance(1)
        addresses.add((buffers.keys.data_ptr(), buffers.values.data_ptr()))
    assert len(addresses) <= 5
    assert buffers.keys.shape[2] < 2 * 2000 + 256
