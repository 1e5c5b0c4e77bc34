"""RMSNorm of a sum with the residual stream, in one launch (``kernels/add_rms_norm.metal``)."""

from __future__ import annotations

import math

import mlx.core as mx

from .kernel import SIMD, Kernel
from .scalars import floats

MAX_THREADS = 1024  # threads of a threadgroup
_ELEMENTS = 4  # elements of a thread, if the row is long enough

_KERNEL = Kernel("add_rms_norm", ["x", "residual", "weight", "eps"], ["y", "total"])


def rms_norm_reference(x: mx.array, weight: mx.array, eps: float | mx.array) -> mx.array:
    """Returns x / sqrt(mean(x²) + eps) · weight over the last axis, in float32.

    Args:
        x: [..., W], float.
        weight: [W].

    Returns:
        [..., W] in the dtype of x.
    """
    wide = x.astype(mx.float32)
    scale = mx.rsqrt(mx.mean(mx.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(mx.float32)).astype(x.dtype)


def add_rms_norm_reference(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Returns the norm of a sum, and the sum, which is rounded to the dtype of x before the norm.

    Args:
        x, residual: [..., W], of one dtype.
        weight: [W].

    Returns:
        rms_norm(x + residual) and x + residual, [..., W] in the dtype of x.
    """
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm_kernel(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Computes :func:`add_rms_norm_reference` with the kernel."""
    width = x.shape[-1]
    threads = min(MAX_THREADS, SIMD * -(-width // (SIMD * _ELEMENTS)))
    y, total = _KERNEL(
        [x, residual, weight, floats(eps)],
        template=[("T", x.dtype), ("WIDTH", width), ("THREADS", threads)],
        grid=(threads, math.prod(x.shape[:-1]), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape] * 2,
        output_dtypes=[x.dtype] * 2,
    )
    return y, total
