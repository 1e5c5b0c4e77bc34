"""Quantises floats: as MLX does, or with the scale and bias of each group that have the smallest rounding error.

MLX spans the whole range of a group, so two extreme values determine the few levels. The search tries several ranges.
It improves each range by alternating two steps, neither of which can increase the error: the nearest codes for the
current scale and bias, and a least squares fit of scale and bias for the current codes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from ..errors import NumericalError
from ..formats import Quantization
from .affine import Affine, nearest_codes, representable

_RANGES = {2: (0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7)}  # shares of a group's range around its middle, by bits
_WIDE = (1.0, 0.9)  # the same for more bits
_FITS = 3
_BLOCK = 1 << 16  # weights that are processed together, so that temporaries stay in the cache
_TINY = 1e-7  # the least scale, as in MLX
_LEAST = 2.0**-100  # far above what needs a scale below the least of e8m0
_FORMATS: dict[
    mx.Dtype, tuple[mx.Dtype, int, int]
] = {  # unsigned integer of the same size, mask of the magnitude, and the first magnitude that is too large
    mx.float32: (mx.uint32, 0x7FFFFFFF, 0x7F000000),  # 2 to the power of 127
    mx.bfloat16: (mx.uint16, 0x7FFF, 0x7F00),
    mx.float16: (mx.uint16, 0x7FFF, 0x7C00),  # infinity
}


def check_finite(array: mx.array, name: str) -> None:
    """Raises NumericalError if an array of floats has a number that is NaN, infinite or above 1e38."""
    if array.dtype in _FORMATS and array.size:
        words, mask, limit = _FORMATS[array.dtype]
        if int((array.view(words) & mask).max()) >= limit:
            raise NumericalError(
                f"{name} has numbers that are NaN, infinite or above 1e38; the checkpoint is damaged: get it again"
            )


def without_tiny(weights: mx.array) -> mx.array:
    """Returns weights with zeros for those below 1e-30, for which MLX's microscaled modes make infinite scales."""
    return mx.where(mx.abs(weights) < _LEAST, 0, weights)


def nearest(weights: mx.array, quantization: Quantization, name: str, losses: dict[str, float]) -> list[mx.array]:
    """Quantises [..., rows, columns] as MLX does, to words, scales and, in affine mode, biases.

    Args:
        losses: in nvfp4, whose scales have a narrow range, the largest error relative to the weights, by name.

    Raises:
        NumericalError: a weight is NaN or infinite.
    """
    check_finite(weights, name)
    if not quantization.is_affine:
        weights = without_tiny(weights)
    parts = list(mx.quantize(weights, **quantization.to_json()))
    if quantization.mode == "nvfp4":
        exact = weights.astype(mx.float32)
        error = mx.dequantize(parts[0], parts[1], mode="nvfp4", dtype=mx.float32) - exact
        loss = mx.sqrt(mx.square(error).sum() / mx.maximum(mx.square(exact).sum(), 1e-30))
        losses[name] = max(losses.get(name, 0.0), float(loss))
    return parts


def search(weights: np.ndarray, bits: int, dtype: str, importance: np.ndarray | None = None) -> Affine:
    """Quantises groups with the smallest squared error that the search finds.

    The error never exceeds that of ``mx.quantize``, because the search starts from its scale and bias.

    Args:
        weights: [N, size] float32, one group per row.
        dtype: dtype of the stored scales and biases: F32, F16 or BF16.
        importance: [size] factors of the squared errors; None means equal factors.

    Raises:
        NumericalError: a weight is NaN or infinite.
    """
    found = Affine(np.empty(weights.shape, np.uint8), *(np.empty(len(weights), np.float32) for _ in range(2)))
    step = max(1, _BLOCK // weights.shape[1])
    blocks = [slice(i, i + step) for i in range(0, len(weights), step)]

    def run(block: slice) -> None:
        found.codes[block], found.scales[block], found.biases[block] = _search(weights[block], bits, dtype, importance)

    if len(blocks) == 1:
        run(blocks[0])
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, blocks))
    return found


def _search(w: np.ndarray, bits: int, dtype: str, importance: np.ndarray | None) -> tuple[np.ndarray, ...]:
    factors = np.ones(w.shape[1], np.float32) if importance is None else importance / importance.mean()
    best = [np.full(len(w), np.inf, np.float32), np.empty(w.shape, np.float32), *np.empty((2, len(w)), np.float32)]
    for scales, biases in _starts(w, bits):
        for fit in range(_FITS + 1):
            scales, biases = representable(scales, dtype), representable(biases, dtype)
            codes = nearest_codes(w, scales, biases, bits)
            error = codes * scales[:, None]
            error += biases[:, None]
            error -= w
            error *= error
            loss = error @ factors
            better = loss < best[0]
            for kept, value in zip(best, (loss, codes, scales, biases), strict=True):
                kept[better] = value[better]
            if fit < _FITS:
                scales, biases = _fitted(w, codes, scales, factors)
    return best[1].astype(np.uint8), best[2], best[3]


def _starts(w: np.ndarray, bits: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the initial scales and biases: those of MLX, and those of several ranges of each group."""
    levels = 2**bits - 1
    low, high = w.min(axis=1), w.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise NumericalError("weights to be quantised are NaN or infinite; the checkpoint is damaged: get it again")
    # MLX represents the extreme with the larger magnitude exactly, and zero a multiple of the scale away
    scales = np.maximum((high - low) / levels, _TINY)
    far_low = np.abs(low) > np.abs(high)
    scales, edge = np.where(far_low, scales, -scales), np.where(far_low, low, high)
    zero = np.rint(edge / scales)
    scales = np.where(zero != 0, edge / np.where(zero != 0, zero, 1), scales)
    starts = [(scales, np.where(zero != 0, edge, 0))]
    for part in _RANGES.get(bits, _WIDE):
        width = np.maximum((high - low) * part, _TINY * levels)
        starts.append((width / levels, (low + high - width) / 2))
    return starts


def _fitted(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least squares scales and biases for given codes. A group with a single code keeps its scale."""
    total = factors.sum()
    mean_code, mean = codes @ factors / total, w @ factors / total
    centred = codes - mean_code[:, None]
    weighted = centred * factors
    variance = np.einsum("ij,ij->i", weighted, centred)
    slope = np.einsum("ij,ij->i", weighted, w) / np.where(variance > 0, variance, 1)
    scales = np.where((variance > 0) & (np.abs(slope) > _TINY), slope, scales)
    return scales, mean - scales * mean_code
