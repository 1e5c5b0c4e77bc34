"""Memory for vector code: aligned, addressable, with room for whole vectors."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

_LINE = 64  # bytes of a cache line and of the widest register


def aligned(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Returns a new uninitialised array that is aligned to cache lines."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def view(array: mx.array) -> np.ndarray:
    """Evaluates an MLX array and returns a NumPy view of its memory; only non-contiguous arrays are copied.

    bfloat16 and float16 become uint16.
    """
    if array.dtype in (mx.bfloat16, mx.float16):
        array = array.view(mx.uint16)
    array = mx.contiguous(array)
    mx.eval(array)
    return np.array(array, copy=False)


def record(names: str) -> np.dtype:
    """Returns the dtype of a kernel's arguments: a record of int64 fields with these names."""
    return np.dtype([(name, np.int64) for name in names.split()])
