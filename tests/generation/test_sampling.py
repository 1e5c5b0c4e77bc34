"""Sampling against plain re-implementations and transformers' processors."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import ArgumentError, NumericalError
from flash_moe.generation.filters import kept_tokens
from flash_moe.generation.sampling import Sampler, Sampling


def naive_kept(logits: np.ndarray, s: Sampling) -> dict[int, float]:
    """top_k, then top_p, then min_p over the full sorted vocabulary."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if s.top_k:
        ranked = ranked[: s.top_k]
    total, chosen, seen = sum(p[i] for i in ranked), [], 0.0
    for i in ranked:
        chosen.append(i)
        seen += p[i] / total
        if seen >= s.top_p and s.top_p < 1:
            break
    chosen = [i for i in chosen if p[i] >= s.min_p * p[chosen[0]]]
    total = sum(p[i] for i in chosen)
    return {i: p[i] / total for i in chosen}


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 2, 7, 50, 3000]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_filters_keep_what_the_definition_says(
    seed: int, size: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = spread * np.random.RandomState(seed).randn(size)
    sampling = Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = kept_tokens(logits, sampling)
    expected = naive_kept(logits, sampling)
    filtered = top_k or top_p < 1 or min_p
    assert ids.tolist() == (list(expected) if filtered else sorted(expected))
    np.testing.assert_allclose(probabilities, [expected[i] for i in ids], rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1)


def test_greedy_takes_the_most_probable_token() -> None:
    assert Sampler(Sampling())(mx.array([0.0, 3.0, 1.0])) == 1


def test_frequencies_follow_the_probabilities() -> None:
    logits = mx.array(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)))
    sampler = Sampler(Sampling(temperature=1, top_k=3, seed=3))
    draws = np.bincount([sampler(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(draws, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_temperature_sharpens() -> None:
    logits = np.log([0.6, 0.4])
    assert kept_tokens(logits / 0.5, Sampling(temperature=0.5))[1][0] == pytest.approx(0.36 / 0.52)


def test_a_seed_reproduces_the_draws_and_none_does_not() -> None:
    logits = mx.array(np.zeros(1000, np.float32))
    draws = [[s(logits) for _ in range(8)] for s in (Sampler(Sampling(temperature=1, seed=x)) for x in (5, 5, 6))]
    assert draws[0] == draws[1] != draws[2]
    fresh = [[s(logits) for _ in range(8)] for s in (Sampler(Sampling(temperature=1)) for _ in range(2))]
    assert fresh[0] != fresh[1]


def test_repetition_penalty_equals_transformers() -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.RandomState(0).randn(20).astype(np.float32)
    seen = [3, 7, 7, 19]
    processed = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), torch.tensor(logits)[None])[0]
    assert Sampler(Sampling(repetition_penalty=1.7), seen)(mx.array(logits)) == int(processed.argmax())


def test_repetition_penalty_counts_generated_tokens() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10))
    assert [sampler(mx.array([1.0, 0.9, -5.0])) for _ in range(2)] == [0, 1]


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    assert Sampler(Sampling(repetition_penalty=3), [0])(mx.array([-1.0, -2.0])) == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(repetition_penalty=2)], ids=str)
def test_nan_logits_are_an_error(sampling: Sampling) -> None:
    with pytest.raises(NumericalError, match="NaN"):
        Sampler(sampling, [0])(mx.array([0.0, float("nan"), 1.0]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
        {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range(options: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampling(**options)
