"""Che's approximation against a simulated memory, and against what must hold exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.experts.lru import LruSlots
from flash_moe.planning.hit_rate import distinct, hit_rate, popularity


def simulated(probabilities: np.ndarray, layers: int, slots: int, tokens: int) -> float:
    """Share of hits of an LRU memory shared by all layers; the first half of the tokens fills it."""
    rng = np.random.default_rng(0)
    memory: LruSlots[tuple[int, int]] = LruSlots(slots)
    requests = hits = 0
    for token in range(tokens):
        for layer in range(layers):
            for expert in np.flatnonzero(rng.random(len(probabilities)) < probabilities):
                key = layer, int(expert)
                hit = memory.touch(key) is not None
                if not hit:
                    memory.assign(key, ())
                if token >= tokens // 2:
                    requests, hits = requests + 1, hits + hit
    return hits / requests


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_against_a_simulation(skew: float, share: float) -> None:
    experts, k, layers = 64, 4, 5
    probabilities = popularity(experts, k, skew)
    found = hit_rate(probabilities, share * experts)
    assert found == pytest.approx(simulated(probabilities, layers, int(share * experts * layers), 600), abs=0.04)


@given(st.integers(1, 300), st.integers(1, 20), st.floats(0, 4))
def test_popularity_is_a_way_to_choose_k(experts: int, k: int, skew: float) -> None:
    k = min(k, experts)
    found = popularity(experts, k, skew)
    assert found.sum() == pytest.approx(k)
    assert found.max() <= 1 + 1e-12
    assert (np.diff(found) <= 1e-12).all()


@given(st.integers(2, 200), st.integers(1, 10), st.floats(0, 2), st.floats(0, 1))
def test_hit_rate_is_a_share_and_grows_with_memory(experts: int, k: int, skew: float, share: float) -> None:
    probabilities = popularity(experts, min(k, experts), skew)
    less, more = hit_rate(probabilities, share * experts / 2), hit_rate(probabilities, share * experts)
    assert 0 <= less <= more <= 1


def test_by_hand() -> None:
    even = popularity(16, 4, 0.0)
    assert even == pytest.approx(np.full(16, 0.25))
    assert distinct(even, 1) == pytest.approx(4)
    assert distinct(even, 2) == pytest.approx(16 * (1 - 0.75**2))  # 7
    assert hit_rate(even, 3.9) == 0  # what one token uses is forgotten before the next
    assert hit_rate(even, 7.1) == pytest.approx(1 - 0.75**2)  # two tokens are remembered
    assert hit_rate(even, 16) == 1


def test_uneven_use_is_easier_to_remember() -> None:
    rates = [hit_rate(popularity(512, 4, skew), 100) for skew in (0.0, 0.5, 1.0)]
    assert rates[0] == pytest.approx(100 / 512, abs=0.01)  # without any skew, the share that fits
    assert rates[0] < rates[1] < rates[2]
