"""What weights in MLX's modes of small floats stand for, by the formats' definitions."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # and the same below zero


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign, exponent, fraction = codes >> 7, (codes >> 3 & 15).astype(np.int64), codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    return np.where(sign == 1, -size, size)


def decoded(words: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """What a matrix in one of the modes stands for, float64."""
    codes = words.view(np.uint8)
    if mode != "mxfp8":
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    else:
        values = e4m3(codes)
    factors = e4m3(scales) if mode == "nvfp4" else 2.0 ** (scales.astype(np.float64) - 127)
    return values * np.repeat(factors, {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}[mode], axis=1)
