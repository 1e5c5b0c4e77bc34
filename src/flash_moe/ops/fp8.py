"""Weights of e4m3 with scales, as other libraries store them."""

from __future__ import annotations

import mlx.core as mx

from ..formats import FP8_BLOCK


def from_fp8(codes: mx.array, scales: mx.array) -> mx.array:
    """Returns the weights that codes and scales stand for, rounded to bfloat16 as the libraries do when they
    dequantise.

    Args:
        codes: [..., out, in] uint8, e4m3.
        scales: [..., a, b] float: a is 1, ``out`` or the number of blocks of 128 rows, b the same for columns; or a number.

    Returns:
        [..., out, in] bfloat16.
    """
    scales = scales.astype(mx.float32)
    if scales.ndim < codes.ndim:
        scales = scales.reshape(*scales.shape[: codes.ndim - 2], 1, 1)
    for axis in (-2, -1):
        size = codes.shape[axis]
        if scales.shape[axis] not in (1, size):
            scales = mx.repeat(scales, FP8_BLOCK, axis=axis)
            scales = scales[..., :size, :] if axis == -2 else scales[..., :size]
    return (mx.from_fp8(codes, dtype=mx.float32) * scales).astype(mx.bfloat16)
