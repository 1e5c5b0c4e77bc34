"""What is different on the CPU: matrix products go through NumPy's BLAS.

MLX's CPU build for Linux has no BLAS: a float32 1024³ product takes 0.6 s there and 0.012 s in NumPy (2 cores). Where
many rows are multiplied on the CPU, ops leave MLX for the product; NumPy sees MLX's memory without a copy.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

MIN_ROWS = 8  # below this, leaving MLX's graph costs more than it saves


def on_cpu(dtype: mx.Dtype) -> bool:
    """Whether an array of this dtype is computed in float32 on the CPU."""
    return dtype == mx.float32 and mx.default_device() == mx.cpu


def use_blas(rows: int, dtype: mx.Dtype) -> bool:
    """Whether a product with this many rows should leave MLX."""
    return rows >= MIN_ROWS and on_cpu(dtype)


def to_numpy(array: mx.array) -> np.ndarray:
    """NumPy's view of an array's memory (evaluates it; no copy)."""
    mx.eval(array)
    return np.array(array, copy=False)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` with broadcasting over leading dimensions, through BLAS where :func:`use_blas` says so."""
    if not use_blas(a.shape[-2], a.dtype):
        return a @ b
    return mx.array(np.matmul(to_numpy(a), to_numpy(b)))
