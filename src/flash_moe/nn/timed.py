"""A single layer of the network, for timing."""

from __future__ import annotations

import mlx.core as mx

from ..config import ModelConfig
from ..experts.store import ExpertStore
from ..ops.dispatch import kernels
from .cache import DeltaCache, KVCache, layer_cache
from .decoder_layer import DecoderLayer
from .sparse_moe import SparseMoE
from .weights import Weights


class TimedLayer:
    """A layer with a store for its experts. x is [T, H] in the dtype of activations.

    Args:
        weights: weights of the layer, which are read immediately.
        store, experts_per_token: as for :class:`~.decoder_layer.DecoderLayer`.
        dtype: dtype of activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        store: ExpertStore,
        experts_per_token: int,
        dtype: mx.Dtype,
    ) -> None:
        self._config, self._index, self._dtype = config, layer, dtype
        with kernels(None):
            self._layer = DecoderLayer(config, layer, weights, store, experts_per_token)
        mx.eval(self._layer.parameters())

    def new_cache(self, context: int) -> KVCache | DeltaCache:
        """Returns a cache; in an attention layer, it holds ``context`` tokens."""
        config, cache = self._config, layer_cache(self._config, self._index, self._dtype)
        if context and isinstance(cache, KVCache):
            shape = (1, config.num_key_value_heads, context, config.head_dim)
            cache.append(mx.zeros(shape, dtype=self._dtype), mx.zeros(shape, dtype=self._dtype))
        mx.eval(cache.arrays)
        return cache

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        """Runs the whole layer."""
        return self._layer(x, cache)

    def front(self, x: mx.array, cache: KVCache | DeltaCache) -> list[mx.array]:
        """Runs the layer without its routed experts."""
        sparse = isinstance(self._layer.mlp, SparseMoE)
        return list(self._layer.front(x, cache)) if sparse else [self(x, cache)]

    def experts(self, x: mx.array, ids: mx.array, weights: mx.array, rest: mx.array) -> mx.array:
        """Runs only the routed experts; see :meth:`SparseMoE.experts`."""
        y: mx.array = self._layer.mlp.experts(x, ids, weights, rest)
        return y
