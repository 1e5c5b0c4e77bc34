"""Quantising for what a matrix sees: less error in its outputs than rounding each weight for itself."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.formats import ProjectionFormat, Quantization
from flash_moe.packing import descent
from flash_moe.packing.calibrated import Expert, quantize_expert, second_moments
from flash_moe.packing.error_feedback import _unit_upper, quantized
from flash_moe.packing.rounding import search
from flash_moe.record import PROJECTIONS

HIDDEN, INTERMEDIATE = 128, 64
TWO_BITS = Quantization(2, 64)


def correlated(rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows whose covariance has eigenvalues that fall off as 1 / i, as those of activations do."""
    own = np.random.default_rng(seed)
    mixing = np.random.default_rng(columns).standard_normal((columns, columns)) / np.sqrt(columns)
    return ((own.standard_normal((rows, columns)) / np.sqrt(1 + np.arange(columns))) @ mixing).astype(np.float32)


def matrix(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) / np.sqrt(columns)).astype(np.float32)


def naive(weights: np.ndarray, q: Quantization = TWO_BITS) -> np.ndarray:
    parts = mx.quantize(mx.array(weights), group_size=q.group_size, bits=q.bits)
    return np.array(mx.dequantize(*parts, group_size=q.group_size, bits=q.bits))


def moments_of(columns: int) -> np.ndarray:
    x = correlated(2000, columns, seed=2)
    return second_moments(x, np.ones(len(x))) + 1e-3 * np.eye(columns) / columns


def output_error(weights: np.ndarray, restored: np.ndarray, moments: np.ndarray) -> float:
    error = (weights - restored).astype(np.float64)
    return float(np.trace(error @ moments @ error.T))


def test_the_factor_is_one_of_the_moments() -> None:
    moments = moments_of(HIDDEN)
    upper, diagonal = _unit_upper(moments)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(np.diag(upper), 1)
    np.testing.assert_allclose(upper * diagonal @ upper.T, moments, atol=1e-5 * np.abs(moments).max())


@pytest.mark.parametrize(("bits", "most"), [(2, 0.3), (3, 0.3), (4, 0.35)])
def test_outputs_change_less_than_by_rounding(bits: int, most: float) -> None:
    weights, moments, q = matrix(96, HIDDEN), moments_of(HIDDEN), Quantization(bits, 64)
    found = quantized(weights, moments, q, "BF16").dequantized().reshape(weights.shape)
    assert output_error(weights, found, moments) < most * output_error(weights, naive(weights, q), moments)


def test_without_correlations_it_is_the_search() -> None:
    weights = matrix(64, HIDDEN)
    found = quantized(weights, np.eye(HIDDEN), TWO_BITS, "BF16").dequantized().reshape(weights.shape)
    searched = search(weights.reshape(-1, 64), 2, "BF16").dequantized().reshape(weights.shape)
    assert np.square(weights - found).sum() <= np.square(weights - searched).sum()


def test_eight_bits_are_close() -> None:
    weights = matrix(64, HIDDEN)
    moments = moments_of(HIDDEN)
    found = quantized(weights, moments, Quantization(8, 64), "BF16").dequantized().reshape(weights.shape)
    assert np.square(found - weights).mean() < 0.02**2 * np.square(weights).mean()
    assert output_error(weights, found, moments) < 2e-5 * output_error(weights, 0 * weights, moments)


def test_what_is_given_back_can_be_stored() -> None:
    found = quantized(matrix(32, HIDDEN), moments_of(HIDDEN), TWO_BITS, "BF16")
    assert found.codes.shape == (32, 2, 64) and found.codes.max() <= 3
    for values in (found.scales, found.biases):
        np.testing.assert_array_equal(np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32)), values)


def test_no_sweep_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, moments = matrix(48, HIDDEN), moments_of(HIDDEN)
    losses = []
    for sweeps in range(6):
        monkeypatch.setattr(descent, "_SWEEPS", sweeps)
        found = quantized(weights, moments, TWO_BITS, "BF16").dequantized().reshape(weights.shape)
        losses.append(output_error(weights, found, moments))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[3] < 0.9 * losses[0]


class TestExpert:
    formats = dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", TWO_BITS))
    expert = Expert(matrix(INTERMEDIATE, HIDDEN, 3), matrix(INTERMEDIATE, HIDDEN, 4), matrix(HIDDEN, INTERMEDIATE, 5))

    def outputs(self, expert: Expert, x: np.ndarray) -> np.ndarray:
        return expert.hidden(x) @ expert.down_proj.T

    def error(self, expert: Expert, x: np.ndarray) -> float:
        return float(np.square(self.outputs(expert, x) - self.outputs(self.expert, x)).sum())

    def rounded(self) -> Expert:
        return Expert(*(naive(getattr(self.expert, name)) for name in PROJECTIONS))

    def calibrated(self, tokens: int) -> Expert:
        x = 10 * correlated(tokens, HIDDEN, seed=6)
        everything = 10 * correlated(3000, HIDDEN, seed=7)
        weights = np.random.default_rng(8).random(tokens).astype(np.float32)
        layer = second_moments(everything, np.ones(len(everything)))
        return quantize_expert(self.expert, self.formats, x, weights, layer)[1]

    @pytest.mark.parametrize(("tokens", "most"), [(2000, 0.35), (100, 0.45), (0, 0.45)])
    def test_held_out_tokens_change_less(self, tokens: int, most: float) -> None:
        held_out = 10 * correlated(1000, HIDDEN, seed=9)
        assert self.error(self.calibrated(tokens), held_out) < most * self.error(self.rounded(), held_out)

    def test_what_is_not_named_stays(self) -> None:
        x = correlated(200, HIDDEN, seed=6)
        only = {"up_proj": self.formats["up_proj"]}
        found, now = quantize_expert(self.expert, only, x, np.ones(len(x)), np.eye(HIDDEN))
        assert list(found) == ["up_proj"]
        assert now.gate_proj is self.expert.gate_proj and now.down_proj is self.expert.down_proj

    def test_inputs_that_are_zero_do_no_harm(self) -> None:
        x = np.zeros((50, HIDDEN), np.float32)
        found, now = quantize_expert(self.expert, self.formats, x, np.ones(50), np.zeros((HIDDEN, HIDDEN)))
        assert list(found) == list(PROJECTIONS)
        assert np.square(now.up_proj - self.expert.up_proj).mean() < 0.2 * np.square(self.expert.up_proj).mean()
