"""RMSNorm of a sum against float64."""

from __future__ import annotations

import emulator
import mlx.core as mx
import numpy as np
import oracles
import pytest
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.ops.norm_kernel import add_rms_norm_kernel, add_rms_norm_reference

EPS = 1e-6
ROUNDINGS = 8  # of |y|: the products, the root and the sum of squares
SMALL = [(3, 5, "bf16"), (2, 70, "bf16"), (2, 70, "f16"), (3, 70, "f32"), (2, 1001, "bf16")]
REAL = [(2, 4096, "bf16"), (1, 4096, "f16"), (1, 2048, "f32")]
CASES = [
    *[(*case, "check", "random") for case in SMALL],
    *[(*case, "fast", "reverse") for case in REAL],
    *[(*case, "nocontract", "forward") for case in REAL],
    (1, 16384, "bf16", "fast", "forward"),
]


@pytest.mark.parametrize("rows, width, dtype, mode, order", CASES)
def test_add_rms_norm(rows: int, width: int, dtype: str, mode: str, order: str) -> None:
    rng = np.random.RandomState(width)
    x, residual = (random(rng, (rows, width), DTYPES[dtype], scale) for scale in (1.0, 10.0))
    weight = random(rng, (width,), DTYPES[dtype])
    exact_total = float64(x) + float64(residual)
    with emulator.options(mode=mode, order=order):
        kernel = add_rms_norm_kernel(x, residual, weight, EPS)
    for y, total in (kernel, add_rms_norm_reference(x, residual, weight, EPS)):
        assert error(total, exact_total, 0.0) <= 1
        expected = oracles.rms_norm(float64(total), float64(weight), EPS)
        assert error(y, expected, ROUNDINGS * np.abs(expected)) <= 1


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_zeros_and_extreme_rows(scale: float) -> None:
    x, weight = random(np.random.RandomState(0), (3, 70), mx.float32, scale), mx.ones((70,))
    expected = oracles.rms_norm(float64(x), 1.0, EPS)
    with emulator.options(mode="check", order="random"):
        y, _ = add_rms_norm_kernel(x, mx.zeros_like(x), weight, EPS)
    assert error(y, expected, ROUNDINGS * np.abs(expected)) <= 1


def test_leading_axes_are_rows() -> None:
    x, weight = random(np.random.RandomState(0), (2, 3, 70), mx.float32), mx.ones((70,))
    assert [y.shape for y in add_rms_norm_kernel(x, x, weight, EPS)] == [x.shape] * 2
