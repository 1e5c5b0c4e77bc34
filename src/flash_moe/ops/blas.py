"""The differences on the CPU: matrix products go through NumPy's BLAS, or through several streams.

MLX's CPU build for Linux has no BLAS: a float32 1024³ product takes 0.6 s there and 0.012 s in NumPy (2 cores), one row
times 1024² 1.7 ms and 0.11. Where much is multiplied on the CPU, ops leave MLX for the product; NumPy sees MLX's memory
without a copy. MLX runs a stream of the CPU on a single thread, so one token takes a stream per core.
"""

from __future__ import annotations

import os
from functools import cache

import mlx.core as mx
import numpy as np

MIN_ROWS = 8  # of a product with a quantised matrix, and of attention; with fewer, leaving MLX's graph does not pay
MIN_PRODUCTS = 1 << 17  # multiplications of two float matrices, from which on it pays
_MOST_STREAMS = 8  # more would wait for the memory


def on_cpu(dtype: mx.Dtype) -> bool:
    """Returns whether an array of this dtype is computed in float32 on the CPU."""
    return dtype == mx.float32 and mx.default_device() == mx.cpu


def use_blas(rows: int, dtype: mx.Dtype) -> bool:
    """Returns whether work on this many rows should leave MLX."""
    return rows >= MIN_ROWS and on_cpu(dtype)


def to_numpy(array: mx.array) -> np.ndarray:
    """Returns NumPy's view of an array's memory (evaluates it; no copy)."""
    mx.eval(array)
    return np.array(array, copy=False)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """Returns ``a @ b`` with broadcasting over leading dimensions, through BLAS where it is large and on the CPU."""
    if a.size * b.shape[-1] < MIN_PRODUCTS or not on_cpu(a.dtype):
        return a @ b
    return mx.array(np.matmul(to_numpy(a), to_numpy(b)))


@cache
def cpu_streams() -> list[mx.ThreadLocalStream]:
    """Returns a stream per core, usable in every thread."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, _MOST_STREAMS))]
