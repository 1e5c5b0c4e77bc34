"""Layers and products with the CPU kernels, for timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..ops.cpu.workers import workers
from .cache import DeltaCache, KVCache
from .cpu_decoder import CpuLayer, turns
from .cpu_layers import Pass, Weights
from .cpu_moe import CpuMoE
from .linear import Linear
from .timed import TimedLayer


class CpuTimedLayer(TimedLayer):
    """A layer like :class:`TimedLayer`. Arguments and results are MLX arrays; each result is a new array."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._weights = Weights(workers())  # keeps the memory that kernels read alive
        self._on_cpu = CpuLayer(self._config, self._layer, self._weights)
        self._frequencies = np.array(self._config.rope_frequencies)

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        y = np.array(x)
        self._on_cpu(y, [cache], self._pass(y, cache))
        return mx.array(y)

    def front(self, x: mx.array, cache: KVCache | DeltaCache) -> list[mx.array]:
        if not isinstance(self._on_cpu.mlp, CpuMoE):
            return [self(x, cache)]
        y = np.array(x)
        self._on_cpu.front(y, [cache], self._pass(y, cache))
        return [mx.array(y)]

    def experts(self, x: mx.array, ids: mx.array, weights: mx.array, rest: mx.array) -> mx.array:
        y = np.array(rest)
        self._on_cpu.mlp.experts(np.array(x), np.array(ids).astype(np.int64), np.array(weights), y)
        return mx.array(y)

    def _pass(self, y: np.ndarray, cache: KVCache | DeltaCache) -> Pass:
        return Pass([len(y)], turns(self._frequencies, [cache.length], [len(y)]))


def product(layer: Linear, x: mx.array) -> Callable[[], mx.array]:
    """Returns a function that multiplies x [1, in] with a linear layer."""
    weights, row = Weights(workers()), np.array(x)
    products = weights.products([layer])

    def multiply(keep: Weights = weights) -> mx.array:
        return mx.array(products(row, np.empty((1, products.rows), np.float32)))

    return multiply
