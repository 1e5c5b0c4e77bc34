"""A token through all layers before the host knows its experts; the host looks afterwards, and corrects.

Where the bank keeps many experts, all that a token needs are often loaded. Then a table on the device says where they
are, and nobody has to wait for the host in every layer. Once per token the host reads all ids back. If a layer lacked an
expert, what was computed from there on is wrong: the host has the expert read, runs that layer as always, and the token
goes ahead again behind it. Layer inputs and recurrent states from before are kept for that, and arrays are immutable; of
keys and values only the last token's are wrong, and are written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..experts.store import ExpertStore
from .cache import DeltaCache, KVCache
from .sparse_moe import SparseMoE

RESTARTS = 2  # of a token; with more layers that lack an expert, the rest of it waits in every layer
PHASE = 8  # tokens that run in one way before its time is compared with the other's
RECHECK = 16  # phases after which the slower way is tried again
MOST_MISSES = 4  # experts of a token that are not loaded; with more, running ahead is not even tried

Caches = Sequence[KVCache | DeltaCache]


@dataclass
class AheadCounters:
    """Counters of single tokens.

    Attributes:
        waited: tokens that waited for the host in every layer.
        ahead: tokens that ran ahead.
        clean: those of them that lacked no expert.
        restarts: layers behind which tokens ran ahead again.
    """

    waited: int = 0
    ahead: int = 0
    clean: int = 0
    restarts: int = 0


class AheadSwitch:
    """Chooses the way that was faster lately, phase by phase; tries the other one from time to time.

    Attributes:
        ahead: whether the next token runs ahead.
        seconds: of a token when waiting (False) and when running ahead (True); absent before it was tried.
    """

    def __init__(self) -> None:
        self.ahead = False
        self.seconds: dict[bool, float] = {}
        self._phase: list[float] = []
        self._misses = 0
        self._since_try = RECHECK

    def record(self, seconds: float, misses: int) -> None:
        """A token took so long, and so many of its experts were not loaded."""
        self._phase.append(seconds)
        self._misses += misses
        if len(self._phase) < PHASE:
            return
        typical, misses = sorted(self._phase)[PHASE // 2], self._misses
        self._phase, self._misses = [], 0
        self.seconds[self.ahead] = typical
        self._since_try += 1
        worthwhile = misses <= MOST_MISSES * PHASE
        if worthwhile and self._since_try > RECHECK:
            self._since_try, self.ahead = 0, not self.ahead
        else:
            faster = self.seconds.get(True, float("inf")) < self.seconds.get(False, float("inf"))
            self.ahead = worthwhile and faster


class RunAhead:
    """Runs single tokens, one way or the other.

    Args:
        layers: of the decoder.
        store: keeps experts and has a table of slots.

    Attributes:
        counters: of the task that is served.
        switch: chooses; tests may put another in its place.
    """

    def __init__(self, layers: Sequence[Any], store: ExpertStore) -> None:
        self._layers, self._store = layers, store
        self._record = max(layout.stride for layout in store.layouts.values())
        self.counters = AheadCounters()
        self.switch = AheadSwitch()

    def __call__(self, x: mx.array, caches: Caches) -> mx.array:
        """Runs all layers on one token.

        Args:
            x: [1, H], the token's embedding.
            caches: of the layers, extended in place.

        Returns:
            [1, H]; the same bits in both ways.
        """
        start, ahead, before = time.perf_counter(), self.switch.ahead, self._store.stats.bytes_brought
        y = self._ahead(x, caches) if ahead else self._wait(x, caches, 0)
        mx.eval(y)  # so that both ways are timed alike; the next token needs it anyway
        self.switch.record(time.perf_counter() - start, (self._store.stats.bytes_brought - before) // self._record)
        self.counters.ahead += ahead
        self.counters.waited += not ahead
        return y

    def _wait(self, x: mx.array, caches: Caches, first: int) -> mx.array:
        for layer, cache in zip(self._layers[first:], caches[first:], strict=True):
            x = layer(x, cache)
        return x

    def _ahead(self, x: mx.array, caches: Caches) -> mx.array:
        first = 0
        for restart in range(RESTARTS + 1):
            y, inputs, undo, sparse, ids = self._describe(x, caches, first)
            if not sparse:
                return y
            chosen = np.array(mx.concatenate(ids))  # waits
            loaded = self._store.use_loaded(sparse, chosen)
            if loaded == len(sparse):
                self.counters.clean += restart == 0
                return y
            mx.eval(y)  # nothing may still read the slots that a fetch overwrites
            missing = sparse[loaded]
            for restore in undo[missing - first :]:
                restore()
            self.counters.restarts += 1
            x, first = self._layers[missing](inputs[missing - first], caches[missing]), missing + 1
        return self._wait(x, caches, first)

    def _describe(
        self, x: mx.array, caches: Caches, first: int
    ) -> tuple[mx.array, list[mx.array], list[Callable[[], None]], list[int], list[mx.array]]:
        """Starts all layers from ``first`` on.

        Returns:
            The last layer's output; of every layer its input, and what undoes its step in the cache; the indices of
            the layers with routed experts, and the ids that each chose, [1, K].
        """
        inputs, undo, sparse, ids = [], [], [], []
        for i in range(first, len(self._layers)):
            layer, cache = self._layers[i], caches[i]
            inputs.append(x)
            undo.append(cache.undo())
            if isinstance(layer.mlp, SparseMoE):
                x, chosen = layer.ahead(x, cache)
                sparse.append(i)
                ids.append(chosen)
            else:
                x = layer(x, cache)
        return x, inputs, undo, sparse, ids
