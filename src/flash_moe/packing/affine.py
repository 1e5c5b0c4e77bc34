"""Affine quantisation in NumPy, as MLX stores it: w ≈ scale · code + bias for each group of a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..formats import ITEM_SIZE


@dataclass(frozen=True)
class Affine:
    """Quantised groups of weights.

    Attributes:
        codes: [..., size] uint8, each below 2^bits.
        scales, biases: [...] float32, with values that the stored dtype can represent.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def dequantized(self) -> np.ndarray:
        """Returns the dequantised weights, [..., size] float32."""
        return self.codes * self.scales[..., None] + self.biases[..., None]


def nearest_codes(weights: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Returns the nearest code of each weight [..., size] for the scale and bias [...] of its group, as float32."""
    codes = weights - biases[..., None]
    codes *= 1 / scales[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 2**bits - 1, out=codes)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes [rows, n] uint8 into [rows, n · bits / 32] uint32, from the least significant bits upwards."""
    planes = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")


def representable(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds values to those that a safetensors dtype (F32, F16 or BF16) can represent, as float32."""
    if dtype == "F32":
        return np.asarray(values, np.float32)
    if dtype == "F16":
        return np.asarray(values, np.float16).astype(np.float32)
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((words + (0x7FFF + (words >> 16 & 1))) & 0xFFFF0000).view(np.float32)  # ties to even


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the bytes of :func:`representable` values [rows, n] in a dtype, [rows, bytes] uint8."""
    if dtype == "BF16":
        words = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")
    else:
        words = np.ascontiguousarray(values, "<f4" if dtype == "F32" else "<f2")
    return words.view(np.uint8).reshape(len(values), ITEM_SIZE[dtype] * values.shape[1])
