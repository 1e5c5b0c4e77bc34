"""Root-mean-square normalisation."""

from __future__ import annotations

import mlx.core as mx

from .blas import on_cpu
from .dispatch import use_kernel
from .norm_kernel import add_rms_norm_kernel
from .scalars import floats


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Returns x / sqrt(mean(x²) + eps) · weight over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], or None for 1.

    Returns:
        [..., D] in the dtype of x.
    """
    if on_cpu(x.dtype):  # MLX's own op is a dozen launches there
        scaled = x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + floats(eps))
        return scaled if weight is None else scaled * weight
    return mx.fast.rms_norm(x, weight, eps)


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Returns the norm of a sum, and the sum.

    Args:
        x, residual: [..., D], float.
        weight: [D].

    Returns:
        rms_norm(x + residual) and x + residual, [..., D] each.
    """
    if use_kernel("add_rms_norm", x.shape[-1], x.dtype):
        return add_rms_norm_kernel(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def l2_norm(x: mx.array, eps: float) -> mx.array:
    """Returns x / sqrt(Σx² + eps) over the last axis; shapes and dtypes as :func:`rms_norm`."""
    if on_cpu(x.dtype):
        return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + floats(eps))
    width = x.shape[-1]
    return mx.fast.rms_norm(x, None, eps / width) * width**-0.5
