"""Runs a token through many layers before the host knows its experts; the host checks and corrects afterwards.

If the bank keeps many experts, all experts of a token are often loaded. A table on the device maps them to their slots,
so the device need not wait for the host in every layer. The host reads back the ids of several layers in one step. If a
layer lacked an expert, all later results are wrong. The host then fetches the expert, computes the experts of that
layer as usual, and continues from there. For this, old recurrent states are kept. In the KV caches, only the last token
is wrong, and it is written again.
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

PHASE = 8  # tokens of a phase, after which the times of both ways are compared
RECHECK = 16  # phases after which the slower way is tried again
GAIN = 0.05  # minimum predicted saving for which running ahead is tried
_WAIT = 1.0  # initial estimate: time of a wait for the host, relative to the time of a layer
_AGAIN = 0.5  # time to compute the experts again, relative to the time of a layer

Caches = Sequence[KVCache | DeltaCache]


@dataclass
class AheadCounters:
    """Counters of single tokens.

    Attributes:
        waited: number of tokens that waited for the host in every layer.
        ahead: number of tokens that ran ahead.
        clean: number of tokens that ran ahead and lacked no expert.
        restarts: number of layers from which tokens continued again because of a missing expert.
    """

    waited: int = 0
    ahead: int = 0
    clean: int = 0
    restarts: int = 0


class AheadSwitch:
    """Chooses the way that was faster recently, phase by phase, and tries the other one from time to time.

    Args:
        layers: number of layers of the model.

    Attributes:
        ahead: whether the next token runs ahead.
        length: number of layers that it then runs before the host checks.
        seconds: seconds of a token with waiting (False) and with running ahead (True); a way that was not tried is
            absent.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.ahead, self.length = False, layers
        self.seconds: dict[bool, float] = {}
        self._phase: list[float] = []
        self._misses = 0
        self._since_try = RECHECK

    def record(self, seconds: float, misses: int) -> None:
        """Records a token: its seconds, and the number of its experts that were not loaded."""
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
    """Chooses the number of layers to run before the host checks.

    With q the probability that a layer lacks no expert, c layers advance a token by (1 - q^c) / (1 - q) layers on
    average.

    Args:
        missing: probability that a layer lacks an expert.

    Returns:
        The number of layers, and the predicted share of time saved.
    """
    hit, best = 1 - missing, (1, 1 + _WAIT)
    for length in (*(2**i for i in range(1, 10) if 2**i < layers), layers):
        fails = 1 - hit**length
        cost = (length + _WAIT + fails * _AGAIN) / (fails / missing if missing else length)
        best = min(best, (length, cost), key=lambda found: found[1])
    return best[0], 1 - best[1] / (1 + _WAIT)


@dataclass
class _Step:
    """A layer that ran ahead: its index, its output, a function that undoes it, and the arguments of its experts."""

    layer: int
    output: mx.array
    undo: Callable[[], None]
    routed: list[mx.array]


class RunAhead:
    """Runs single tokens, ahead or with a wait in every layer.

    Args:
        layers: the layers of the decoder.
        store: a store that keeps experts and has tables of slots.

    Attributes:
        counters: the counters of the current task.
        switch: chooses the way; tests may replace it.
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
            caches: the caches of the layers, extended in place.

        Returns:
            The output [1, H], with the same bits in both ways.
        """
        start, ahead, before = time.perf_counter(), self.switch.ahead, self._store.stats.bytes_loaded
        y = self._ahead(x, caches) if ahead else self._wait(x, caches)
        mx.eval(y)  # so that both ways are timed equally; the next token needs it anyway
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
            mx.eval(x)  # no computation may still read the slots that a fetch overwrites
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
