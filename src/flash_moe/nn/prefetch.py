"""Prefetches the experts that the next layer will probably choose, after the reads of the current layer.

A layer adds only a small vector to the residual stream. So the next layer's norm and router, applied to this layer's
residual, choose mostly the experts that the next layer will use (Eliseev and Mazur 2023, "Fast Inference of
Mixture-of-Experts Language Models with Offloading").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np

from ..experts.store import ExpertStore, StoreStats
from ..share import WHOLE, Share
from .prefetch_switch import PrefetchSwitch

Router = Callable[[Any], Any]  # maps the residual stream [1, H] to logits [1, E] float32; MLX or NumPy arrays


@dataclass
class PrefetchCounters:
    """Counters over all decoded tokens and layers with a prediction.

    Attributes:
        tokens: number of decoded tokens with predictions.
        needed: number of fetched experts. ``found``: number of fetched experts that were predicted.
    """

    tokens: int = 0
    needed: int = 0
    found: int = 0


class Prefetcher:
    """The predictions of all layers of a decoder, and counters of the correct predictions.

    Args:
        k: number of predicted experts per layer.
        clock: function that returns the time in seconds.
    """

    def __init__(
        self, store: ExpertStore, k: int, clock: Callable[[], float] = time.perf_counter, share: Share = WHOLE
    ) -> None:
        self.switch, self.counters = PrefetchSwitch(), PrefetchCounters()
        self.active = False
        self._store, self._k, self._share, self._clock = store, k, share, clock
        self._predicted: dict[int, frozenset[int]] = {}  # predicted experts by layer

    @contextmanager
    def token(self) -> Iterator[None]:
        """Encloses the pass of a single token through all layers."""
        self.active = self.switch.on
        start = self._clock()
        try:
            with self._store.counting(StoreStats()) as spent:
                yield
        finally:
            predicted, self.active = self.active, False
            self._predicted.clear()
        self.counters.tokens += predicted
        loaded = spent.bytes_loaded if self._store.copies else spent.bytes_missing
        self.switch.record(self._clock() - start, spent.bytes_missing, loaded)

    def predict(self, layer: int, logits: Any) -> None:
        """Starts to read the most probable experts of a layer. logits: [1, E] float32."""
        values = np.array(logits)[0]
        probable = np.argsort(-values, kind="stable")[: self._k]  # the last requests can still be cancelled
        experts = probable[self._share.owns(layer, probable)].tolist()
        self._predicted[layer] = frozenset(experts)
        self._store.prefetch(layer, experts)

    def needed(self, layer: int, experts: Sequence[int]) -> None:
        """Compares the fetched experts of a layer with the predicted ones."""
        if (predicted := self._predicted.pop(layer, None)) is not None:
            self.counters.needed += len(experts)
            self.counters.found += len(predicted.intersection(experts))


def connect(shared: Prefetcher, layers: Sequence[Any], sparse: type) -> None:
    """Connects every layer whose ``mlp`` has the type ``sparse`` with the next one, for prefetching."""
    found = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer.mlp, sparse)]
    for (i, layer), following in zip_longest(found, found[1:]):
        router = None if following is None else (following[0], following[1].router_logits)
        layer.mlp.prefetch = LayerPrefetch(shared, i, router)


class LayerPrefetch:
    """The prefetching of one layer.

    Args:
        following: the next layer with experts, and its router; None for the last layer.
    """

    def __init__(self, shared: Prefetcher, layer: int, following: tuple[int, Router] | None) -> None:
        self._shared, self._layer, self._following = shared, layer, following

    def logits(self, residual: Any) -> Any:
        """Returns the next router's logits for this residual stream, [1, E] float32, not evaluated; None if not needed."""
        if not self._following or not self._shared.active:
            return None
        found = self._following[1](residual)
        return found.astype(mx.float32) if isinstance(found, mx.array) else found  # NumPy does not support bfloat16

    def reading(self, experts: Sequence[int], logits: Any) -> None:
        """Queues reads of the next layer's experts behind the reads of this layer, so that the disk stays busy."""
        self._shared.needed(self._layer, experts)
        if self._following and logits is not None:
            self._shared.predict(self._following[0], logits)
