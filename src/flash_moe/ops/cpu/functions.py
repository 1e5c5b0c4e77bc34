"""Small functions of float32 for Numba kernels, which LLVM inlines and vectorises."""

from __future__ import annotations

import numpy as np

from .compiling import helper

f32, i32 = np.float32, np.int32


@helper
def exp(x):  # type: ignore[no-untyped-def]
    """Returns e^x within 2 ulp, with x clamped to -87 ... 88; the polynomial is that of Cephes' expf."""
    clipped = min(max(x, f32(-87.3)), f32(88.7))
    n = np.floor(clipped * f32(1.44269504) + f32(0.5))
    r = clipped - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    y = (p * r * r + r + f32(1)) * i32((i32(n) + i32(127)) << i32(23)).view(np.float32)
    return y if x == x else x


@helper
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Returns 1 / (1 + e^-x)."""
    return f32(1) / (f32(1) + exp(-x))
