"""Matrix products on the CPU: through NumPy's BLAS, or through several MLX streams.

MLX's CPU build for Linux has no BLAS. On 2 cores, a float32 1024³ product takes 0.6 s in MLX and 0.012 s in NumPy; one
row times 1024² takes 1.7 ms and 0.11 ms. So large products on the CPU use NumPy, which accesses MLX's memory without a
copy. MLX runs a CPU stream on a single thread, so one token uses a stream per core.
"""

from __future__ import annotations

import os
from functools import cache

import mlx.core as mx
import numpy as np

MIN_ROWS = 8  # minimum rows for quantised products and attention; fewer are faster in MLX
MIN_PRODUCTS = 1 << 17  # minimum multiplications for two float matrices
_MOST_STREAMS = 8  # more streams would only wait for memory


def on_cpu(dtype: mx.Dtype) -> bool:
    """Returns whether MLX uses the CPU and the dtype is float32."""
    return dtype == mx.float32 and mx.default_device() == mx.cpu


def use_blas(rows: int, dtype: mx.Dtype) -> bool:
    """Returns whether an op with this many rows should use NumPy instead of MLX."""
    return rows >= MIN_ROWS and on_cpu(dtype)


def to_numpy(array: mx.array) -> np.ndarray:
    """Evaluates an array and returns a NumPy view of its memory, without a copy."""
    mx.eval(array)
    return np.array(array, copy=False)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """Returns ``a @ b`` with broadcasting over leading dimensions. Large products on the CPU use BLAS."""
    if a.size * b.shape[-1] < MIN_PRODUCTS or not on_cpu(a.dtype):
        return a @ b
    return mx.array(np.matmul(to_numpy(a), to_numpy(b)))


@cache
def cpu_streams() -> list[mx.ThreadLocalStream]:
    """Returns one stream per core. All threads can use these streams."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(min(os.cpu_count() or 1, _MOST_STREAMS))]
