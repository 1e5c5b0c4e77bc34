"""Sampling against plain re-implementations and transformers' processors."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import ArgumentError, NumericalError
from flash_moe.generation.filters import decisive_tokens, kept_tokens
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


class Only:
    """A format that allows the same few tokens at every step."""

    def __init__(self, size: int, *tokens: int) -> None:
        self.mask = np.isin(np.arange(size), tokens)
        self.masks, self.accepted = 0, []

    def prepare(self) -> None:
        pass

    def allows(self, token: int) -> bool:
        return bool(self.mask[token])

    def allowed(self) -> np.ndarray:
        self.masks += 1
        return self.mask.copy()

    def accept(self, token: int) -> None:
        assert self.mask[token]
        self.accepted.append(token)

    def forced(self) -> list[int]:
        return np.flatnonzero(self.mask).tolist() if self.mask.sum() == 1 else []


def test_greedy_takes_the_most_probable_allowed_token_and_masks_only_where_it_must() -> None:
    constraint = Only(4, 1, 2)
    sampler = Sampler(Sampling(), constraint=constraint)
    assert sampler(mx.array([0.0, 3.0, 1.0, 2.0])) == 1 and constraint.masks == 0
    assert sampler(mx.array([0.0, 1.0, 2.0, 3.0])) == 2 and constraint.masks == 1
    assert constraint.accepted == [1, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.4}, {"top_k": 2, "top_p": 0.9}, {"top_k": 40}, {"repetition_penalty": 1.3}],
    ids=str,
)  # fmt: skip
def test_draws_under_a_format_are_those_of_masked_logits(options: dict) -> None:
    logits = np.log(np.array([0.3, 0.2, 0.15, 0.13, 0.12, 0.06, 0.04], np.float32))
    allowed = [0, 2, 3, 5, 6]
    masked = np.where(np.isin(np.arange(7), allowed), logits, -np.inf)
    adjusted = masked.astype(np.float64)
    if "repetition_penalty" in options:
        adjusted[2] *= 1.3
    ids, probabilities = kept_tokens(adjusted, Sampling(temperature=1, **options))
    expected = np.zeros(7)
    expected[ids] = probabilities
    draws = np.zeros(7)
    random = np.random.default_rng(0)
    for seed in random.integers(0, 2**31, 4000).tolist():
        sampler = Sampler(Sampling(temperature=1, seed=seed, **options), [2], constraint=Only(7, *allowed))
        draws[sampler(mx.array(logits))] += 1
    np.testing.assert_allclose(draws / draws.sum(), expected, atol=0.035)


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 3, 50, 300]),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    share=st.sampled_from([0.02, 0.5, 0.98]),
    top_k=st.sampled_from([0, 1, 3, 40, 70]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_few_tokens_decide_as_a_mask_would(
    seed: int, size: int, spread: float, share: float, top_k: int, top_p: float, min_p: float
) -> None:
    random = np.random.RandomState(seed)
    logits, allowed = spread * random.randn(size), random.rand(size) < share
    sampling = Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = decisive_tokens(logits, sampling, lambda token: bool(allowed[token]))
    if ids is not None and sampling.filters:
        expected, shares = kept_tokens(np.where(allowed, logits, -np.inf), sampling)
        chosen, probabilities = kept_tokens(logits[ids], sampling)
        assert ids[chosen].tolist() == expected.tolist()
        np.testing.assert_allclose(probabilities, shares, rtol=1e-9)


@pytest.mark.parametrize(
    "options", [{"top_k": 20, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 1}], ids=str
)
def test_a_likely_token_needs_no_mask(options: dict) -> None:
    logits = np.random.RandomState(0).randn(3000).astype(np.float32)
    logits[2998] = 30
    sampling = Sampling(temperature=1, **options)
    constraint = Only(3000, *range(2000, 2999))
    assert Sampler(sampling, constraint=constraint)(mx.array(logits)) == 2998 and constraint.masks == 0
    constraint = Only(3000, 7)
    assert Sampler(sampling, constraint=constraint)(mx.array(logits)) == 7 and constraint.masks == 1


def test_forced_tokens_are_accepted_and_counted() -> None:
    constraint = Only(3, 2)
    sampler = Sampler(Sampling(frequency_penalty=1), constraint=constraint)
    assert sampler.forced() == [2] and constraint.accepted == [2]
    constraint.mask[:] = True
    assert sampler(mx.array([0.0, 0.1, 1.05])) == 1  # 2 has been said once


def test_nothing_is_forced_where_every_token_is_looked_at() -> None:
    assert Sampler(Sampling(), constraint=Only(3, 2), logprobs=0).forced() == []
    assert Sampler(Sampling(), constraint=Only(3, 2), processors=[lambda tokens, logits: logits]).forced() == []
    assert Sampler(Sampling()).forced() == []


def test_presence_and_frequency_penalties_count_the_reply_only() -> None:
    logits = mx.array([1.0, 0.9, -5.0])
    frequency = Sampler(Sampling(frequency_penalty=0.08), [0, 0, 0])
    assert [frequency(logits) for _ in range(4)] == [0, 0, 1, 0]
    presence = Sampler(Sampling(presence_penalty=0.15), [0, 0, 0])
    assert [presence(logits) for _ in range(4)] == [0, 1, 0, 0]
    assert Sampler(Sampling(presence_penalty=-3, temperature=0), [1])(logits) == 0


def test_logit_bias() -> None:
    logits = mx.array([1.0, 0.9, 0.0])
    assert Sampler(Sampling(logit_bias={1: 0.2}))(logits) == 1
    assert Sampler(Sampling(logit_bias={0: -math.inf, 1: -math.inf}))(logits) == 2
    with pytest.raises(ArgumentError, match="no token is left"):
        Sampler(Sampling(logit_bias={2: -math.inf}), constraint=Only(3, 2))(logits)


def test_logits_processors_of_mlx_lm() -> None:
    pytest.importorskip("mlx_lm")
    from mlx_lm.sample_utils import make_logits_processors

    logits, seen = mx.array(np.random.RandomState(0).randn(20).astype(np.float32)), [3, 7, 19]
    theirs = make_logits_processors(logit_bias={5: 1.5}, repetition_penalty=1.7)
    ours = Sampler(Sampling(logit_bias={5: 1.5}, repetition_penalty=1.7), seen)
    sampler = Sampler(Sampling(), seen, processors=theirs)
    assert [sampler(logits) for _ in range(5)] == [ours(logits) for _ in range(5)]


def test_processors_see_prompt_and_reply() -> None:
    seen = []

    def count(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.where(mx.arange(3) == len(seen) - 1, 1.0, logits)

    sampler = Sampler(Sampling(), [2, 2], processors=[count])
    assert [sampler(mx.array([0.5, 0.0, 0.0])) for _ in range(3)] == [0, 1, 2] and seen == [
        [2, 2],
        [2, 2, 0],
        [2, 2, 0, 1],
    ]
    with pytest.raises(ArgumentError, match=r"returned \(3,\), expected .* shape \(1, 3\)"):
        Sampler(Sampling(), processors=[lambda tokens, logits: logits[0]])(mx.array([0.5, 0.0, 0.0]))


def test_log_probabilities_are_the_networks_own() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(logit_bias={2: 9.0}), logprobs=2)
    sampler(mx.array(np.log(probabilities).astype(np.float32) + 3))
    found = sampler.logprobs
    assert found is not None and found.token == 2 and [id for id, _ in found.top] == [0, 1]
    np.testing.assert_allclose([found.logprob, *(p for _, p in found.top)], np.log([0.15, 0.5, 0.3]), rtol=1e-5)
    none = Sampler(Sampling(), logprobs=0)
    none(mx.array([0.0, 1.0]))
    assert none.logprobs is not None and none.logprobs.top == ()


@pytest.mark.parametrize(
    "options",
    [{"presence_penalty": math.nan}, {"frequency_penalty": math.inf}, {"logit_bias": {-1: 2.0}}, {"logit_bias": {1: math.inf}}],
    ids=str,
)  # fmt: skip
def test_penalties_and_biases_out_of_range(options: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampling(**options)
