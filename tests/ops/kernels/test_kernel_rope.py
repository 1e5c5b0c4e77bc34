"""Head norms, rotary embedding and the split of the gate, against float64."""

from __future__ import annotations

from typing import Any

import emulator
import mlx.core as mx
import numpy as np
import pytest
import sequence_oracles as oracle
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.ops.qk_norm_rope import place, qk_norm_rope_kernel, qk_norm_rope_reference
from flash_moe.rope import Yarn, frequencies

THETA, EPS, LAST = 1e7, 1e-6, 262143  # the longest context of the released models
YARN = Yarn(factor=4.0, original_max_position_embeddings=LAST + 1)
ROUNDINGS = 24  # of the largest element: the norm's, and the angle's 2^-24 of a turn
RAGGED, FULL, REAL = (3, 1, 40, 16), (4, 2, 64, 64), (16, 2, 256, 64)  # Hq, Hkv, D, rotary dims
CASES = [
    *[(RAGGED, 3, 11, dtype, "check", "random") for dtype in DTYPES],
    (FULL, 1, LAST, "bf16", "check", "random"),
    *[(REAL, 1, 0, dtype, "fast", "reverse") for dtype in DTYPES],
    *[(REAL, 2, LAST - 1, dtype, "fast", "forward") for dtype in DTYPES],
    *[(REAL, 2, 100_003, dtype, "nocontract", "forward") for dtype in DTYPES],
]


def inputs(sizes: tuple[int, int, int, int], tokens: int, dtype: mx.Dtype) -> list[mx.array]:
    heads, kv_heads, dim, _ = sizes
    rng = np.random.RandomState(dim)
    shapes = [(tokens, heads * 2 * dim), (tokens, kv_heads * dim), (dim,), (dim,)]
    return [random(rng, shape, dtype, 2.0) for shape in shapes]


def by_kernel(*arrays: mx.array, start: int, **options: Any) -> tuple[mx.array, mx.array, mx.array]:
    return qk_norm_rope_kernel(*arrays, place=place(start, arrays[0].shape[0]), **options)


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("sizes, tokens, start, dtype, mode, order", CASES, ids=str)
def test_qk_norm_rope(
    sizes: tuple[int, int, int, int], tokens: int, start: int, dtype: str, mode: str, order: str, yarn: Yarn | None
) -> None:
    arrays = inputs(sizes, tokens, DTYPES[dtype])
    options = {"start": start, "frequencies": frequencies(sizes[3], THETA, yarn), "eps": EPS}
    expected = oracle.qk_norm_rope(*map(float64, arrays), **options)
    with emulator.options(mode=mode, order=order):
        kernel = by_kernel(*arrays, **options)
    for path in (kernel, qk_norm_rope_reference(*arrays, **options)):
        for y, exact in zip(path[:2], expected[:2], strict=True):
            assert error(y, exact, ROUNDINGS * np.abs(exact).max()) <= 1
        np.testing.assert_array_equal(float64(path[2]), expected[2])


@pytest.mark.parametrize("start, mlx_error", [(0, 1e-6), (1000, 1e-4), (LAST, 0.02)])
def test_pairs_and_angles_are_those_of_mlx_rope(start: int, mlx_error: float) -> None:
    """The same embedding, but MLX's angles are float32 products, which far positions leave few digits."""
    arrays = inputs(REAL, 1, mx.float32)
    options = {"start": start, "frequencies": frequencies(64, THETA), "eps": EPS}
    exact, _, _ = oracle.qk_norm_rope(*map(float64, arrays), **options)
    q, _, _ = by_kernel(*arrays, **options)
    unturned, _, _ = qk_norm_rope_reference(*arrays, **{**options, "start": 0})
    by_mlx = mx.fast.rope(unturned[None], 64, traditional=False, base=THETA, scale=1.0, offset=start)[0]
    distance, distance_of_mlx = (np.abs(float64(y) - exact).max() for y in (q, by_mlx))
    assert distance_of_mlx < mlx_error * np.abs(exact).max()
    assert distance < 2e-6 * np.abs(exact).max()
