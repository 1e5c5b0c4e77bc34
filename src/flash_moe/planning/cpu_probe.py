"""Layers whose work runs through the kernels of the CPU, to be timed as those of MLX are."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..nn.cache import DeltaCache, KVCache
from ..nn.cpu_decoder import CpuLayer, turns
from ..nn.cpu_layers import Pass, Weights
from ..nn.decoder import DecoderLayer
from ..nn.linear import Linear
from ..ops.cpu.workers import workers


class CpuProbeLayer:
    """A layer of the decoder as :class:`~.probe.Probe` calls it: arrays of MLX, new ones every time."""

    def __init__(self, config: ModelConfig, layer: DecoderLayer) -> None:
        self._weights = Weights(workers())  # keeps the memory that kernels read
        self._layer = CpuLayer(config, layer, self._weights)
        self._frequencies = np.array(config.rope_frequencies)
        self.mlp = self

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        y = np.array(x)
        self._layer(y, cache, self._pass(y, cache))
        return mx.array(y)

    def front(self, x: mx.array, cache: KVCache | DeltaCache) -> list[mx.array]:
        """As :meth:`DecoderLayer.front`."""
        y = np.array(x)
        self._layer.front(y, cache, self._pass(y, cache))
        return [mx.array(y)]

    def experts(self, x: mx.array, ids: mx.array, weights: mx.array, rest: mx.array) -> mx.array:
        """As :meth:`SparseMoE.experts`."""
        y = np.array(rest)
        self._layer.mlp.experts(np.array(x), np.array(ids).astype(np.int64), np.array(weights), y)
        return mx.array(y)

    def _pass(self, y: np.ndarray, cache: KVCache | DeltaCache) -> Pass:
        return Pass(len(y), turns(self._frequencies, cache.length, len(y)))


def product(layer: Linear, x: mx.array) -> Callable[[], mx.array]:
    """What multiplies x, [1, in], with a linear layer."""
    weights, row = Weights(workers()), np.array(x)
    products = weights.products([layer])

    def multiply(keep: Weights = weights) -> mx.array:
        return mx.array(products(row, np.empty((1, products.rows), np.float32)))

    return multiply
