"""Root-mean-square normalisation of rows."""

from __future__ import annotations

import numpy as np
from numba import types

from .compiling import MATRIX, function

f32 = np.float32


@function(MATRIX, types.float32[::1], types.float32, MATRIX)
def rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Computes out = x / sqrt(mean(x²) + eps) · weight for x [T, D] float32 and weight [D]; out may be x."""
    for t in range(x.shape[0]):
        total = f32(0)
        for i in range(x.shape[1]):
            total += x[t, i] * x[t, i]
        factor = f32(1) / np.sqrt(total / f32(x.shape[1]) + f32(eps))
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] * factor * weight[i]
