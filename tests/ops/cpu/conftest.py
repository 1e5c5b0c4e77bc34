"""Stored matrices with their float64 values, and pools of one and two threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("numba")

from flash_moe.ops.cpu.formats import Format
from flash_moe.ops.cpu.memory import view
from flash_moe.ops.cpu.products import Matrix
from flash_moe.ops.cpu.workers import Workers

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


class Stored:
    """A random matrix in a format.

    Attributes:
        arrays: weights, scales and biases as they are stored.
        values: what they stand for, float64.
    """

    def __init__(self, fmt: Format, rows: int, columns: int, seed: int = 0) -> None:
        w = mx.array(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) / columns**0.5)
        dtype = DTYPES[fmt.dtype]
        if fmt.bits:
            q, *rest = mx.quantize(w, group_size=fmt.group_size, bits=fmt.bits)
            parts = [q, *(a.astype(dtype) for a in rest)]
            exact = [q, *(a.astype(mx.float32) for a in parts[1:])]
            values = mx.dequantize(*exact, group_size=fmt.group_size, bits=fmt.bits)
        else:
            parts = [w.astype(dtype)]
            values = parts[0].astype(mx.float32)
        self.arrays, self.values = [view(part) for part in parts], np.array(values).astype(np.float64)
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
