"""A token through many layers before the host knows its experts; the host looks afterwards, and corrects.

Where the bank keeps many experts, all that a token needs are often loaded. Then a table on the device says where they
are, and nobody has to wait for the host in every layer: the host reads the ids of several layers back at a time. If a
layer lacked an expert, what was computed behind it is wrong: the host has the expert read, computes that layer's experts
as always, and the token goes ahead again from there. Recurrent states from before are kept for that, and arrays are
immutable; of keys and values only the last token's are wrong, and are written again.
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

PHASE = 8  # tokens that run in one way before its time is compared with the other's
RECHECK = 16  # phases after which the slower way is tried again
GAIN = 0.05  # share of the time that running ahead must promise to be tried
_WAIT = 1.0  # of the time a layer takes: what waiting for the host adds, as a first guess
_AGAIN = 0.5  # of the time a layer takes: computing its experts again

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

    Args:
        layers: of the model.

    Attributes:
        ahead: whether the next token runs ahead.
        length: layers that it then runs before the host looks.
        seconds: of a token when waiting (False) and when running ahead (True); absent before it was tried.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.ahead, self.length = False, layers
        self.seconds: dict[bool, float] = {}
        self._phase: list[float] = []
        self._misses = 0
        self._since_try = RECHECK

    def record(self, seconds: float, misses: int) -> None:
        """Counts a token: its seconds, and how many of its experts were not loaded."""
        self._phase.append(seconds)
        self._misses += misses
        if len(self._phase) < PHASE:
            return
        self.seconds[self.ahead] = sorted(self._phase)[PHASE // 2]
        self.length, promised = best_length(min(1.0, self._misses / (PHASE * self._layers)), self._layers)
        self._phase, self._misses = [], 0
        self._since_try += 1
        worthwhile = promised >= GAIN
        if worthwhile and self._since_try > RECHECK:
            self._since_try, self.ahead = 0, not self.ahead
        else:
            faster = self.seconds.get(True, float("inf")) < self.seconds.get(False, float("inf"))
            self.ahead = worthwhile and faster


def best_length(missing: float, layers: int) -> tuple[int, float]:
    """Chooses how many layers to run before the host looks.

    With q the chance that a layer lacks nothing, c layers bring a token forward by (1 - q^c) / (1 - q) of them.

    Args:
        missing: the chance that a layer lacks an expert.

    Returns:
        The number, and the share of the time that it promises to save.
    """
    hit, best = 1 - missing, (1, 1 + _WAIT)
    for length in (*(2**i for i in range(1, 10) if 2**i < layers), layers):
        fails = 1 - hit**length
        cost = (length + _WAIT + fails * _AGAIN) / (fails / missing if missing else length)
        best = min(best, (length, cost), key=lambda found: found[1])
    return best[0], 1 - best[1] / (1 + _WAIT)


@dataclass
class _Step:
    """A layer that was run ahead: its index and output, what undoes it, and what its experts take, the ids first but one."""

    layer: int
    output: mx.array
    undo: Callable[[], None]
    routed: list[mx.array]


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
        self.switch = AheadSwitch(len(layers))

    def __call__(self, x: mx.array, caches: Caches) -> mx.array:
        """Runs all layers on one token.

        Args:
            x: [1, H], the token's embedding.
            caches: of the layers, extended in place.

        Returns:
            [1, H]; the same bits in both ways.
        """
        start, ahead, before = time.perf_counter(), self.switch.ahead, self._store.stats.bytes_loaded
        y = self._ahead(x, caches) if ahead else self._wait(x, caches)
        mx.eval(y)  # so that both ways are timed alike; the next token needs it anyway
        self.switch.record(time.perf_counter() - start, (self._store.stats.bytes_loaded - before) // self._record)
        self.counters.ahead += ahead
        self.counters.waited += not ahead
        return y

    def _wait(self, x: mx.array, caches: Caches) -> mx.array:
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, cache)
        return x

    def _ahead(self, x: mx.array, caches: Caches) -> mx.array:
        first, length, restarts = 0, self.switch.length, 0
        while first < len(self._layers):
            steps = self._start(x, caches, range(first, min(first + length, len(self._layers))))
            x, first = steps[-1].output, first + len(steps)
            sparse = [step for step in steps if step.routed]
            if not sparse:
                continue
            chosen = np.array(mx.concatenate([step.routed[1] for step in sparse]))  # waits
            loaded = self._store.use_loaded([step.layer for step in sparse], chosen)
            if loaded == len(sparse):
                continue
            mx.eval(x)  # nothing may still read the slots that a fetch overwrites
            missing = sparse[loaded]
            for step in steps[missing.layer + 1 - steps[0].layer :]:
                step.undo()
            x, first = self._layers[missing.layer].mlp.experts(*missing.routed), missing.layer + 1
            length, restarts = max(2, length // 2), restarts + 1
        self.counters.clean += not restarts
        self.counters.restarts += restarts
        return x

    def _start(self, x: mx.array, caches: Caches, layers: range) -> list[_Step]:
        """Starts layers one after the other."""
        steps = []
        for i in layers:
            layer, cache = self._layers[i], caches[i]
            undo, routed = cache.undo(), []
            if isinstance(layer.mlp, SparseMoE):
                x, *routed = layer.ahead(x, cache)
            else:
                x = layer(x, cache)
            steps.append(_Step(i, x, undo, routed))
        return steps
