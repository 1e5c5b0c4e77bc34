"""The search for scales and biases: never worse than MLX's, and much better where levels are few."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import NumericalError
from flash_moe.formats import MODES, Quantization
from flash_moe.packing.affine import packed, representable, stored
from flash_moe.packing.rounding import check_finite, nearest, search

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def as_stored(values: np.ndarray, dtype: str) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(DTYPES[dtype])


def mlx_errors(weights: mx.array, bits: int) -> np.ndarray:
    """Squared errors of ``mx.quantize``, by group (a row)."""
    words, *floats = mx.quantize(weights, group_size=weights.shape[1], bits=bits)
    scales, biases = (part.astype(mx.float32) for part in floats)
    restored = mx.dequantize(words, scales, biases, group_size=weights.shape[1], bits=bits)
    return np.square(np.array(restored) - np.array(weights.astype(mx.float32))).sum(axis=1)


def own_errors(weights: mx.array, bits: int, dtype: str) -> np.ndarray:
    floats = np.array(weights.astype(mx.float32))
    return np.square(search(floats, bits, dtype).dequantized() - floats).sum(axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([32, 64, 128]),
    freedom=st.sampled_from([1.5, 3.0, 100.0]),
    centre=st.sampled_from([0.0, 0.5, -30.0]),
    scale=st.sampled_from([1e-3, 0.02, 1.0]),
)
def test_never_worse_than_mlx(
    dtype: str, bits: int, seed: int, size: int, freedom: float, centre: float, scale: float
) -> None:
    values = scale * (np.random.default_rng(seed).standard_t(freedom, (20, size)).clip(-1e3, 1e3) + centre)
    weights = as_stored(values, dtype)
    errors = mlx_errors(weights, bits)
    assert (own_errors(weights, bits, dtype) <= errors * (1 + 1e-4) + 1e-12 * scale**2).all()


@pytest.mark.parametrize("freedom", [5, 100])
@pytest.mark.parametrize(("bits", "most"), [(2, 0.7), (3, 0.82), (4, 0.9)])
def test_clearly_better_where_levels_are_few(bits: int, most: float, freedom: int) -> None:
    weights = as_stored(0.02 * np.random.default_rng(0).standard_t(freedom, (500, 64)), "BF16")
    assert own_errors(weights, bits, "BF16").sum() < most * mlx_errors(weights, bits).sum()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_groups_of_one_value_are_exact(value: float) -> None:
    assert own_errors(as_stored(np.full((3, 64), value), "BF16"), 2, "BF16").max() < 1e-12


def test_four_values_at_equal_distances_are_exact() -> None:
    values = np.random.default_rng(0).integers(0, 4, (50, 64)) * 0.25 - 0.5
    assert own_errors(as_stored(values, "BF16"), 2, "BF16").max() == 0


def test_importance_moves_errors_to_where_they_matter_less() -> None:
    rng = np.random.default_rng(1)
    weights, importance = rng.standard_normal((300, 64)).astype(np.float32), rng.random(64).astype(np.float32) ** 4
    losses = [
        np.square(search(weights, 2, "BF16", factors).dequantized() - weights) @ importance
        for factors in (importance, None)
    ]
    assert losses[0].sum() < 0.95 * losses[1].sum()


def test_does_not_depend_on_what_else_is_searched() -> None:
    weights = np.random.default_rng(2).standard_normal((3000, 64)).astype(np.float32)
    whole, part = search(weights, 3, "BF16"), search(weights[1234:1300], 3, "BF16")
    np.testing.assert_array_equal(whole.codes[1234:1300], part.codes)
    np.testing.assert_array_equal(whole.scales[1234:1300], part.scales)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 5] = value
    with pytest.raises(NumericalError, match="NaN or infinite; the checkpoint is damaged"):
        search(weights, 2, "BF16")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_are_mlx_words(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (7, 128)).astype(np.uint8)
    ones, zeros = mx.ones((7, 2)), mx.zeros((7, 2))
    restored = mx.dequantize(mx.array(packed(codes, bits)), ones, zeros, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(restored), codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_stored_as_mlx_stores_them(dtype: str) -> None:
    values = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    expected = as_stored(values, dtype)
    np.testing.assert_array_equal(representable(values, dtype), np.array(expected.astype(mx.float32)))
    words = expected.view(mx.uint32 if dtype == "F32" else mx.uint16)
    np.testing.assert_array_equal(stored(representable(values, dtype), dtype), np.array(words).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 3.4e38])
def test_numbers_that_are_not_finite_are_refused(dtype: str, value: float) -> None:
    weights = np.random.default_rng(0).standard_normal((8, 64))
    check_finite(as_stored(weights, dtype), "weights")
    weights[3, 17] = value
    for quantization in [Quantization(4, 64), *map(Quantization.of_mode, MODES)]:
        with pytest.raises(NumericalError, match="norm has numbers that are NaN, infinite or above"):
            nearest(as_stored(weights, dtype), quantization, "norm", {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_weights_of_every_size_stay_finite(mode: str, dtype: str) -> None:
    """Scales below the least of e8m0 wrap around in ``mx.quantize``."""
    values = np.exp2(np.linspace(-148, 126.9, 1000))[:, None] * np.ones(32)
    weights = as_stored(values, dtype)
    found = nearest(weights, Quantization.of_mode(mode), "weights", {})
    restored = np.array(mx.dequantize(*found, mode=mode, dtype=mx.float32))
    assert np.isfinite(restored).all()
    if mode != "nvfp4":  # whose scales have a narrow range
        np.testing.assert_allclose(restored, np.array(weights.astype(mx.float32)), rtol=0.3, atol=1e-30)
