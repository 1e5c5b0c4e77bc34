"""Dropping and swapping against every possibility, tried one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import ArgumentError
from flash_moe.nn.expert_choice import ExpertChoice, cold, swaps
from flash_moe.nn.streaming_options import StreamingOptions


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, list[bool]]:
    """Router probabilities of a few experts, K, and which of them are in memory."""
    experts = draw(st.integers(1, 8))
    # whole numbers make ties, and products with simple shares exact
    parts = np.array(draw(st.lists(st.integers(1, 40), min_size=experts, max_size=experts)), np.float32)
    memory = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    return parts / np.float32(256), draw(st.integers(1, min(experts, 4))), memory


shares = st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])


class Memory:
    """Says which experts are in memory, and remembers who was asked about."""

    def __init__(self, present: Sequence[bool]) -> None:
        self.present, self.asked = present, set()

    def __call__(self, experts: Sequence[int]) -> list[bool]:
        self.asked.update(experts)
        return [self.present[e] for e in experts]


def all_swaps(p: np.ndarray, out: list[int], into: list[int], regret: float) -> Iterator[tuple[int, float]]:
    """Number and loss of every allowed set of swaps."""
    for n in range(min(len(out), len(into)) + 1):
        for gone in combinations(out, n):
            for new in permutations(into, n):
                if all(p[b] >= (1 - regret) * p[a] for a, b in zip(gone, new, strict=True)):
                    yield n, float(sum(p[a] - p[b] for a, b in zip(gone, new, strict=True)))


@given(case=cases(), regret=shares)
def test_most_swaps_at_the_least_loss(case: tuple[np.ndarray, int, list[bool]], regret: float) -> None:
    p, k, present = case
    order = np.argsort(-p, kind="stable")
    missing = np.array([not present[e] for e in order[:k]])
    if not missing.any():
        return
    memory = Memory(present)
    places, new = swaps(p, order, missing, regret, memory)
    gone = order[places]
    assert missing[places].all() and len(set(places.tolist())) == len(places) == len(set(new.tolist()))
    assert all(present[e] for e in new) and not set(new.tolist()) & set(order[:k].tolist())
    assert (p[new] >= (1 - regret) * p[gone]).all()
    others = [e for e in order[k:].tolist() if present[e]]
    possible = list(all_swaps(p, [e for e in order[:k].tolist() if not present[e]], others, regret))
    most = max(n for n, _ in possible)
    assert len(new) == most
    assert float((p[gone] - p[new]).sum()) == pytest.approx(min(loss for n, loss in possible if n == most), abs=1e-7)
    least = (1 - regret) * p[order[:k]][missing].min()
    candidates = [e for e in order[k:].tolist() if p[e] >= least]
    assert memory.asked == set(candidates[: len(memory.asked)])  # the likeliest, and no more than decide the matter
    assert sum(present[e] for e in memory.asked) <= missing.sum()
    assert memory.asked == set(candidates) or sum(present[e] for e in memory.asked) == missing.sum()


@given(case=cases(), threshold=shares)
def test_cold_experts_of_little_weight(case: tuple[np.ndarray, int, list[bool]], threshold: float) -> None:
    p, k, present = case
    p, missing = p[:k], ~np.array(present[:k])
    expected = [bool(a) and x < threshold * p.sum() for x, a in zip(p, missing, strict=True)]
    if all(expected):
        expected[max(range(k), key=lambda i: p[i])] = False
    assert cold(p, missing, threshold).tolist() == expected


@given(case=cases(), threshold=st.just(0.0) | shares, regret=st.just(0.0) | shares, normalize=st.booleans())
def test_what_is_used_and_counted(
    case: tuple[np.ndarray, int, list[bool]], threshold: float, regret: float, normalize: bool
) -> None:
    p, k, present = case
    choice = ExpertChoice(k, normalize, StreamingOptions(drop_cold_below=threshold, prefer_cached=regret))
    top = set(np.argsort(-p, kind="stable")[:k].tolist())
    for _ in range(2):
        used, weights = choice(p.copy(), Memory(present))
    assert weights.dtype == np.float32 and 1 <= len(set(used.tolist())) == len(used) <= k
    expected = p[used] / p[used].sum() if normalize else p[used]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    new, gone = set(used.tolist()) - top, top - set(used.tolist())
    dropped = k - len(used)
    found = choice.counters
    assert (found.routed, found.dropped, found.swapped) == (2 * k, 2 * dropped, 2 * len(new))
    assert all(not present[e] for e in gone) and len(gone) == dropped + len(new)
    mass = float(sum(p[e] for e in top))
    assert found.routed_mass == pytest.approx(2 * mass)
    lost = mass - float(p[used].sum())
    assert found.dropped_mass + found.swapped_mass == pytest.approx(2 * lost, abs=1e-6)
    if not regret:
        assert not new and found.swapped_mass == 0
    if not threshold:
        assert dropped == 0 and found.dropped_mass == 0


def test_swaps_leave_the_rest_to_be_dropped() -> None:
    p = np.array([0.4, 0.2, 0.16, 0.15, 0.05, 0.04], np.float32)
    choice = ExpertChoice(3, True, StreamingOptions(drop_cold_below=0.3, prefer_cached=0.1))
    used, weights = choice(p, Memory([True, False, False, True, False, True]))
    assert used.tolist() == [0, 3]  # 2 gives way to 3, nothing is near 1, and its share is 0.2 of 0.75
    np.testing.assert_allclose(weights, [0.4 / 0.55, 0.15 / 0.55], rtol=1e-6)
    found = choice.counters
    assert (found.routed, found.dropped, found.swapped) == (3, 1, 1)
    assert (found.routed_mass, found.dropped_mass, found.swapped_mass) == pytest.approx((0.76, 0.2, 0.01))


def test_experts_in_memory_stay_as_the_router_chose_them() -> None:
    p = np.array([0.1, 0.3, 0.2, 0.25, 0.15], np.float32)
    memory = Memory([False, True, True, True, False])
    used, _ = ExpertChoice(3, True, StreamingOptions(drop_cold_below=1.0, prefer_cached=1.0))(p, memory)
    assert used.tolist() == [1, 3, 2]
    assert memory.asked == {1, 2, 3}


@pytest.mark.parametrize("name", ["drop_cold_below", "prefer_cached"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", True, None], ids=repr)
def test_shares_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is .*, expected a number from 0 to 1"):
        StreamingOptions(**{name: value})


def test_prefetch_is_a_flag() -> None:
    with pytest.raises(ArgumentError, match="prefetch is 1, expected True or False"):
        StreamingOptions(prefetch=1)
