"""Memory that vector code reads and writes: aligned, by address, with room for whole vectors."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

_LINE = 64  # bytes of a cache line, and of the widest register


def aligned(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Returns a new array on cache lines, not initialised."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def view(array: mx.array) -> np.ndarray:
    """Returns NumPy's view of an MLX array's memory, of any dtype of weights (evaluates it; copies only what is not
    contiguous).

    bfloat16 and float16 come as uint16.
    """
    if array.dtype in (mx.bfloat16, mx.float16):
        array = array.view(mx.uint16)
    array = mx.contiguous(array)
    mx.eval(array)
    return np.array(array, copy=False)


def record(names: str) -> np.dtype:
    """Returns what kernels get as arguments: a record of int64 with these names."""
    return np.dtype([(name, np.int64) for name in names.split()])
