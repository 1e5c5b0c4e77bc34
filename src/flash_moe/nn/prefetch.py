"""Reads the experts that the next layer will probably choose, right behind those of this one.

What a layer adds to the residual stream is small against what is there, so the next layer's norm and router applied to
this layer's residual choose mostly the experts that they will choose in earnest (Eliseev and Mazur 2023, "Fast
Inference of Mixture-of-Experts Language Models with Offloading").
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

Router = Callable[[Any], Any]  # [1, H], the residual stream, to [1, E] float32 logits; arrays of MLX or NumPy


@dataclass
class PrefetchCounters:
    """Counters over the decoded tokens and layers that a prediction was made for.

    Attributes:
        tokens: decoded tokens with predictions.
        needed: experts that were fetched; ``found``: those of them that had been predicted.
    """

    tokens: int = 0
    needed: int = 0
    found: int = 0


class Prefetcher:
    """The predictions that the layers of one decoder share, and counters of how many are right.

    Args:
        k: experts that are predicted per layer.
        clock: gives seconds.
    """

    def __init__(
        self, store: ExpertStore, k: int, clock: Callable[[], float] = time.perf_counter, share: Share = WHOLE
    ) -> None:
        self.switch, self.counters = PrefetchSwitch(), PrefetchCounters()
        self.active = False
        self._store, self._k, self._share, self._clock = store, k, share, clock
        self._predicted: dict[int, frozenset[int]] = {}  # by layer

    @contextmanager
    def token(self) -> Iterator[None]:
        """Around the pass of a single token through all layers."""
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
        """Starts to read the likeliest experts of a layer. logits: [1, E] float32."""
        values = np.array(logits)[0]
        likeliest = np.argsort(-values, kind="stable")[: self._k]  # the last requests can still be cancelled
        experts = likeliest[self._share.owns(layer, likeliest)].tolist()
        self._predicted[layer] = frozenset(experts)
        self._store.prefetch(layer, experts)

    def needed(self, layer: int, experts: Sequence[int]) -> None:
        """Compares what a layer fetched with what was predicted for it."""
        if (predicted := self._predicted.pop(layer, None)) is not None:
            self.counters.needed += len(experts)
            self.counters.found += len(predicted.intersection(experts))


def connect(shared: Prefetcher, layers: Sequence[Any], sparse: type) -> None:
    """Lets every layer whose ``mlp`` is of the type ``sparse`` prefetch for the next one."""
    found = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer.mlp, sparse)]
    for (i, layer), following in zip_longest(found, found[1:]):
        router = None if following is None else (following[0], following[1].router_logits)
        layer.mlp.prefetch = LayerPrefetch(shared, i, router)


class LayerPrefetch:
    """One layer's part.

    Args:
        following: the next layer that has experts, and its router; None for the last one.
    """

    def __init__(self, shared: Prefetcher, layer: int, following: tuple[int, Router] | None) -> None:
        self._shared, self._layer, self._following = shared, layer, following

    def logits(self, residual: Any) -> Any:
        """Returns what the next layer's router says of this residual stream, [1, E] float32, not evaluated; None if
        nobody asks.
        """
        if not self._following or not self._shared.active:
            return None
        found = self._following[1](residual)
        return found.astype(mx.float32) if isinstance(found, mx.array) else found  # NumPy knows no bfloat16

    def reading(self, experts: Sequence[int], logits: Any) -> None:
        """This layer's experts are being read; those of the next line up behind them, so that the disk never rests."""
        self._shared.needed(self._layer, experts)
        if self._following and logits is not None:
            self._shared.predict(self._following[0], logits)
