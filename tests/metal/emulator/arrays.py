"""Between `mx.array` and the bytes that a kernel sees."""

import ctypes
import math

import mlx.core as mx
import numpy as np

from .errors import MetalError

_NUMPY = {
    mx.bool_: np.bool_,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # NumPy has no bfloat16: the bits
    mx.float32: np.float32,
}


def _numpy(array: mx.array) -> np.ndarray:
    if array.dtype not in _NUMPY:
        raise MetalError(f"the emulator has no arrays of {array.dtype}; expected one of {[str(d) for d in _NUMPY]}")
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def input_buffers(name: str, array: mx.array, row_contiguous: bool) -> dict[str, bytes]:
    """The buffers that one input can become: its elements, and `_shape`, `_strides` and `_ndim`."""
    values = _numpy(array)
    if row_contiguous:
        values = np.ascontiguousarray(values).reshape(array.shape)
    if values.size == 0 or any(stride < 0 for stride in values.strides):
        values = values.copy()
    span = 0
    if values.size:
        span = values.itemsize + sum((n - 1) * stride for n, stride in zip(values.shape, values.strides, strict=True))
    strides = [stride // values.itemsize for stride in values.strides]
    return {
        name: ctypes.string_at(values.ctypes.data, span),
        f"{name}_shape": np.array(array.shape, np.int32).tobytes(),
        f"{name}_strides": np.array(strides, np.int64).tobytes(),
        f"{name}_ndim": np.int32(array.ndim).tobytes(),
    }


def output_buffer(shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None) -> bytes:
    """`init_value` everywhere, or 0xFF bytes: NaN, or -1, where the kernel writes nothing."""
    if dtype not in _NUMPY:
        raise MetalError(f"the emulator has no arrays of {dtype}; expected one of {[str(d) for d in _NUMPY]}")
    if init_value is None:
        return b"\xff" * (math.prod(shape) * dtype.size)
    return _numpy(mx.full(shape, init_value, dtype=dtype)).tobytes()


def to_array(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """The `mx.array` that `data` holds."""
    values = mx.array(np.frombuffer(data, _NUMPY[dtype]).reshape(shape))
    return values.view(mx.bfloat16) if dtype == mx.bfloat16 else values
