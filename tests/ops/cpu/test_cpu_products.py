"""Products with stored matrices against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from small_floats import decoded

from flash_moe.ops.cpu.formats import Format
from flash_moe.ops.cpu.products import Matrix, Products
from flash_moe.ops.cpu.workers import Workers

TOLERANCE = 1e-6  # of the largest
AFFINE = [Format("BF16", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
OTHERS = [Format(dtype, bits, 64) for dtype in ("F16", "F32") for bits in (4, 3)]
MODES = [Format("U8", 4, 32, "mxfp4"), Format("U8", 8, 32, "mxfp8")]
MODES += [Format("U8", 4, 16, "nvfp4", scaled) for scaled in (False, True)]
PLAIN = [Format(dtype) for dtype in ("BF16", "F16", "F32")]


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())


def multiplied(stored: list[Any], pools: list[Workers], tokens: int) -> None:
    columns = stored[0].values.shape[1]
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ np.concatenate([s.values for s in stored]).T
    found = []
    for pool in pools:
        products = Products([s.matrix for s in stored], pool)
        y = products(x, np.full((tokens, products.rows), np.nan, np.float32))
        assert close(y, expected)
        assert close(products(x, np.ones_like(y), add=True), 1 + expected)
        found.append(y)
    assert np.array_equal(found[0].view(np.uint32), found[1].view(np.uint32))  # whatever the number of threads


@pytest.mark.parametrize("fmt", AFFINE + OTHERS + MODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_format(stored: Any, pools: list[Workers], fmt: Format, tokens: int) -> None:
    for columns in {fmt.group_size, 3 * fmt.group_size, 640}:
        multiplied([stored(fmt, 37, columns)], pools, tokens)


@pytest.mark.parametrize("fmt", PLAIN, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 50])
def test_plain_weights_of_any_width(stored: Any, pools: list[Workers], fmt: Format, columns: int) -> None:
    for tokens in (1, 5):
        multiplied([stored(fmt, 7, columns)], pools, tokens)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 300])
def test_several_matrices_of_one_input(stored: Any, pools: list[Workers], tokens: int) -> None:
    formats = [Format("BF16", 4, 64), Format("BF16", 8, 64), Format("BF16"), Format("BF16", 4, 32)]
    rows = [100, 17, 1, 50]
    multiplied([stored(f, n, 192, i) for i, (f, n) in enumerate(zip(formats, rows, strict=True))], pools, tokens)


def test_nothing_is_read_outside_of_a_matrix(stored: Any, pools: list[Workers]) -> None:
    """NaN and infinities around weights, scales and x must not show."""
    fmt, columns, rows = Format("F32", 3, 32), 96, 5
    inner = stored(fmt, rows, columns)
    kept, places = [], []
    for array in inner.arrays:
        raw = array.reshape(-1).view(np.uint8)
        room = np.full(raw.size + 512, 0xFF, np.uint8)
        start = 256 - room.ctypes.data % 4
        room[start : start + raw.size] = raw
        kept.append(room)
        places.append(room.ctypes.data + start)
    matrix = Matrix(fmt, rows, columns, (places[0], places[1], places[2]))
    x = np.full((9, columns), np.nan, np.float32)[2:7]
    x[:] = np.random.default_rng(2).standard_normal(x.shape)
    y = Products([matrix], pools[1])(x, np.empty((5, rows), np.float32))
    assert close(y, x.astype(np.float64) @ inner.values.T)


def test_every_small_float(pools: list[Workers]) -> None:
    """All codes of e2m1 and e4m3, with all scales that are no NaN."""
    for mode, group in (("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32)):
        fmt = Format("U8", 8 if mode == "mxfp8" else 4, group, mode)
        codes = np.tile(np.arange(256, dtype=np.uint8), 4)
        if mode == "mxfp8":
            codes[codes & 127 == 127] = 1
        scales = np.arange(64, 191, dtype=np.uint8) if mode != "nvfp4" else np.arange(127, dtype=np.uint8)
        columns = len(codes) * 8 // fmt.bits
        w, s = np.tile(codes, (len(scales), 1)), np.repeat(scales[:, None], columns // group, axis=1)
        matrix = Matrix(fmt, len(w), columns, (w.ctypes.data, s.ctypes.data, 0))
        expected = decoded(w, s, mode)
        for tokens in (1, 4):
            first = np.zeros((tokens, columns), np.float32)
            for i in (0, 1, 7, columns - 1, columns // 2 + 3):
                first[:] = 0
                first[:, i] = 1
                y = Products([matrix], pools[1])(first, np.empty((tokens, len(w)), np.float32))
                np.testing.assert_allclose(y, np.tile(expected[:, i], (tokens, 1)), rtol=1e-6)
