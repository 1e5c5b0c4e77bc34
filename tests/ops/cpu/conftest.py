"""Stored matrices with their float64 values, and pools of one and two threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("numba")
sys.path.insert(0, str(Path(__file__).parents[1]))  # what the tests of all ops share

from small_floats import decoded

from flash_moe.ops.cpu.formats import Format
from flash_moe.ops.cpu.memory import view
from flash_moe.ops.cpu.products import Matrix
from flash_moe.ops.cpu.workers import Workers

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8}


class Stored:
    """A random matrix in a format.

    Attributes:
        arrays: weights, scales and biases as they are stored.
        values: what they stand for, float64.
    """

    def __init__(self, fmt: Format, rows: int, columns: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        w = mx.array(rng.standard_normal((rows, columns)).astype(np.float32) / columns**0.5)
        dtype = DTYPES[fmt.dtype]
        if fmt.mode != "affine":
            even = mx.pad(w, [(0, rows % 2), (0, 0)])  # mx.quantize on the CPU takes no odd number of groups of 16
            parts = [part[:rows] for part in mx.quantize(even, mode=fmt.mode)]
            values = decoded(np.array(parts[0]), np.array(parts[1]), fmt.mode)
            if fmt.global_scale:
                parts.append(mx.array(rng.uniform(1000, 5000, 1).astype(np.float32)))
                values = values * (np.array(parts[2], np.float64) / 2688)
        elif fmt.bits:
            q, *rest = mx.quantize(w, group_size=fmt.group_size, bits=fmt.bits)
            parts = [q, *(a.astype(dtype) for a in rest)]
            exact = [q, *(a.astype(mx.float32) for a in parts[1:])]
            values = mx.dequantize(*exact, group_size=fmt.group_size, bits=fmt.bits)
        else:
            parts = [w.astype(dtype)]
            values = parts[0].astype(mx.float32)
        self.arrays, self.values = [view(part) for part in parts], np.array(values, np.float64)
        places = [array.ctypes.data for array in self.arrays] + [0, 0]
        self.matrix = Matrix(fmt, rows, columns, (places[0], places[1], places[2]))


@pytest.fixture(scope="session")
def pools() -> Iterator[list[Workers]]:
    found = [Workers(1), Workers(2)]
    yield found
    for pool in found:
        pool.close()


@pytest.fixture
def stored() -> Any:
    return Stored
