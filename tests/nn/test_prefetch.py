"""Predictions are counted as they were, and prefetching is on only where its trial showed a gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.experts.store import ExpertStore
from flash_moe.nn.prefetch import LayerPrefetch, Prefetcher
from flash_moe.nn.prefetch_switch import ORDER, PHASE, QUIET, RECHECK, TRIAL, PrefetchSwitch


class Log(ExpertStore):
    """Has no records, but remembers what was to be prefetched."""

    def __init__(self) -> None:
        super().__init__({}, 4)
        self.prefetched: list[tuple[int, set[int]]] = []

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        raise AssertionError("it has nothing to fetch")

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        raise AssertionError("it holds nothing")

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self.prefetched.append((layer, set(experts)))

    def close(self) -> None: ...


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(prefetcher: Prefetcher, store: Log, clock: Clock, tokens: int, seconds: float, gain: float = 0.0) -> list[bool]:
    """Tokens that take so long, less a share with prefetching, and all miss bytes. Returns when it was active."""
    active = []
    for _ in range(tokens):
        with prefetcher.token():
            active.append(prefetcher.active)
            clock.now += seconds * (1 - gain * prefetcher.active)
            for stats in store._counting:
                stats.bytes_missing += 100 + prefetcher.active
        assert not prefetcher.active
        clock.now += 1000.0  # what the caller does between tokens is not counted
    return active


def test_recall_counts_the_experts_that_were_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefetchSwitch, "on", True)
    store = Log()
    prefetcher = Prefetcher(store, 3, Clock())
    logits = {1: [5, 4, 3, 2, 1, 0], 4: [0, 1, 9, 2, 8, 7]}  # layers 2 and 3 have no experts
    layers = [
        LayerPrefetch(prefetcher, 0, (1, lambda x: mx.array([logits[1]]) + x)),
        LayerPrefetch(prefetcher, 1, (4, lambda x: mx.array([logits[4]], dtype=mx.bfloat16))),
        LayerPrefetch(prefetcher, 4, None),
    ]
    needed = [[3, 4], [0, 2, 4], [2, 0]]
    for _ in range(3):
        with prefetcher.token():
            for layer, experts in zip(layers, needed, strict=True):
                layer.reading(experts, layer.logits(mx.zeros((1, 6))))
    assert store.prefetched == 3 * [(1, {0, 1, 2}), (4, {2, 4, 5})]
    found = prefetcher.counters
    assert (found.tokens, found.needed, found.found) == (3, 3 * 5, 3 * 3)


def test_nothing_is_predicted_while_nothing_is_loaded() -> None:
    store, clock = Log(), Clock()
    prefetcher = Prefetcher(store, 2, clock)
    layer = LayerPrefetch(prefetcher, 0, (1, lambda x: pytest.fail("a prediction")))
    for _ in range(2 * TRIAL):
        with prefetcher.token():
            assert layer.logits(mx.zeros((1, 4))) is None
    assert prefetcher.switch.decision == "nothing to load"
    assert prefetcher.switch.compared is None


@pytest.mark.parametrize("copies", [True, False])
def test_copies_out_of_the_page_cache_are_worth_a_trial(copies: bool) -> None:
    store, clock = Log(), Clock()
    store.copies = copies
    prefetcher = Prefetcher(store, 2, clock)
    for _ in range(1 + TRIAL):
        with prefetcher.token():
            clock.now += 0.5 if prefetcher.active else 1.0
            for stats in store._counting:
                stats.bytes_loaded += 100
    assert prefetcher.switch.decision == ("on" if copies else "nothing to load")


@pytest.mark.parametrize(("gain", "decision"), [(0.1, "on"), (0.0, "off"), (0.01, "off"), (-0.3, "off")])
def test_the_trial_decides(gain: float, decision: str) -> None:
    store, clock = Log(), Clock()
    prefetcher = Prefetcher(store, 2, clock)
    assert run(prefetcher, store, clock, 1, 1.0) == [False]  # misses bytes for the first time
    assert prefetcher.switch.decision == "measuring"
    active = run(prefetcher, store, clock, TRIAL, 2.0, gain)
    assert active == [side for side in ORDER for _ in range(PHASE)]
    assert prefetcher.switch.decision == decision
    found = prefetcher.switch.compared
    assert found is not None
    assert (found.missing, found.missing_without) == (101, 100)
    assert (found.seconds, found.seconds_without, found.saved) == pytest.approx((2 - 2 * gain, 2, gain))
    assert run(prefetcher, store, clock, 20, 1.0) == 20 * [decision == "on"]


def test_caches_that_fill_up_favour_no_side() -> None:
    switch = PrefetchSwitch()
    switch.record(9.0, 1, 1)
    for number in range(TRIAL):
        switch.record(5 - number / TRIAL, 1, 1)
    assert switch.compared is not None
    assert switch.compared.saved == pytest.approx(0, abs=1e-12)
    assert switch.decision == "off"


def test_a_decision_is_measured_again() -> None:
    store, clock = Log(), Clock()
    prefetcher = Prefetcher(store, 2, clock)
    run(prefetcher, store, clock, 1 + TRIAL, 1.0, gain=-0.5)
    assert run(prefetcher, store, clock, RECHECK, 1.0) == RECHECK * [False]
    assert prefetcher.switch.decision == "measuring"
    assert sum(run(prefetcher, store, clock, TRIAL, 1.0, gain=0.5)) == TRIAL // 2
    assert prefetcher.switch.decision == "on"
    assert run(prefetcher, store, clock, RECHECK, 1.0) == RECHECK * [True]
    run(prefetcher, store, clock, TRIAL, 1.0, gain=-0.5)
    assert prefetcher.switch.decision == "off"


def test_on_pauses_while_nothing_is_loaded() -> None:
    switch = PrefetchSwitch()
    switch.record(1.0, 1, 1)
    for _ in range(TRIAL):
        switch.record(0.5 if switch.on else 1.0, 1, 1)
    assert switch.decision == "on"
    for number in range(2 * QUIET):
        assert switch.on is (number < QUIET)
        switch.record(1.0, 0, 0)
    assert switch.decision == "nothing to load"
    switch.record(1.0, 1, 1)
    assert switch.on and switch.decision == "on"  # no new trial


def test_a_token_that_fails_leaves_no_prediction_behind() -> None:
    store, clock = Log(), Clock()
    prefetcher = Prefetcher(store, 1, clock)
    run(prefetcher, store, clock, 1 + PHASE, 1.0)
    with pytest.raises(OSError), prefetcher.token():
        assert prefetcher.active
        prefetcher.predict(1, mx.array([[0.0, 1.0]]))
        raise OSError
    prefetcher.needed(1, [1])
    assert (prefetcher.active, prefetcher.counters.needed, prefetcher.counters.tokens) == (False, 0, 0)


def test_predicted_are_the_likeliest() -> None:
    store = Log()
    logits = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    Prefetcher(store, 5).predict(7, mx.array(logits))
    assert store.prefetched == [(7, set(np.argsort(logits[0])[-5:].tolist()))]
