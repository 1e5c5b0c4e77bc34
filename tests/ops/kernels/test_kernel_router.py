"""Softmax and top-K in one kernel, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracles
import pytest
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.ops.router_kernel import route, supports

ROUNDINGS = 12  # exp amplifies the rounding of its argument, which is a difference of two logits

# tokens, E, K, dtype of the logits, normalize
SMALL = [(3, 70, 5, "bf16", True), (2, 33, 16, "f16", False), (1, 1, 1, "f32", True), (1, 6, 6, "f32", False)]
REAL = [(1, 512, 10, "bf16", True), (2, 512, 10, "f32", False), (1, 1024, 16, "f16", True)]
CASES = [
    *[pytest.param(*case, "check", id=f"small{i}-check") for i, case in enumerate(SMALL)],
    *[pytest.param(*case, "fast", id=f"real{i}-fast") for i, case in enumerate(REAL)],
    *[pytest.param(*case, "nocontract", id=f"real{i}-nocontract") for i, case in enumerate(REAL[:1])],
]


def oracle(logits: np.ndarray, k: int, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    p = oracles.softmax(logits)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(p, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalize else weights


@pytest.mark.parametrize("tokens, experts, k, dtype, normalize, mode", CASES, indirect=["mode"])
def test_route(tokens: int, experts: int, k: int, dtype: str, normalize: bool, mode: str) -> None:
    logits = random(np.random.RandomState(experts), (tokens, experts), DTYPES[dtype], 3.0)
    ids, weights = route(logits, k, normalize)
    expected_ids, expected = oracle(float64(logits), k, normalize)
    assert ids.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(ids), expected_ids)
    assert error(weights, expected, ROUNDINGS * expected) <= 1


@pytest.mark.parametrize("mode", ["check", "fast"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shared_gate_comes_along(dtype: str, mode: str) -> None:
    rng = np.random.RandomState(5)
    logits, shared = (random(rng, shape, DTYPES[dtype], 3.0) for shape in [(3, 40), (3, 1)])
    ids, weights = route(logits, 4, True, shared)
    plain_ids, plain = route(logits, 4, True)
    expected = 1 / (1 + np.exp(-float64(shared)))
    np.testing.assert_array_equal(np.array(ids), np.array(plain_ids))
    np.testing.assert_array_equal(np.array(weights[:, :4]), np.array(plain))
    assert error(weights[:, 4:], expected, ROUNDINGS * expected) <= 1


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_go_to_the_lower_expert_and_infinities_are_ordered(normalize: bool) -> None:
    logits = np.zeros((4, 70), np.float32)
    logits[0, ::2] = -0.0
    logits[1, [69, 3, 40, 41]] = 1.0
    logits[2, 5:] = -np.inf
    logits[3] = -np.arange(70)[::-1] % 7
    ids, weights = route(mx.array(logits), 5, normalize)
    expected_ids, expected = oracle(logits.astype(np.float64), 5, normalize)
    np.testing.assert_array_equal(np.array(ids), expected_ids)
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_nan_logits_give_nan_weights_of_their_token_alone(nan: float, normalize: bool) -> None:
    logits = np.random.RandomState(0).randn(2, 70).astype(np.float32)
    logits[0, 44] = nan
    ids, weights = route(mx.array(logits), 5, normalize)
    assert np.isnan(np.array(weights[0])).all()
    assert np.isfinite(np.array(weights[1])).all()
    assert len(set(np.array(ids[0]).tolist())) == 5 and np.array(ids).max() < 70


def test_overflowed_logits_give_nan_weights() -> None:
    _, weights = route(mx.array([[np.inf, 1.0, 2.0]]), 2, True)
    assert np.isnan(np.array(weights)).all()


def test_limits() -> None:
    assert supports(mx.zeros((1, 1024)), 16)
    assert not supports(mx.zeros((1, 1025)), 16)
    assert not supports(mx.zeros((1, 512)), 33)
