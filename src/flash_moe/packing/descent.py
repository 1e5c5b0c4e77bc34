"""Improves a quantised matrix by coordinate descent over its codes, and over the scale and bias of each group.

The objective is tr(E H Eᵀ) as in error_feedback.py. With everything else fixed, it is a parabola in each code, so the
best code is the nearest to its minimum. It is a quadratic form in the scale and bias of a group. No step can increase
it. Rows are independent and are processed together.
"""

from __future__ import annotations

import numpy as np

from .affine import representable

_SWEEPS = 3  # a sixth sweep had no measurable gain


def descend(
    errors: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    moments: np.ndarray,
    bits: int,
    dtype: str,
) -> None:
    """Sweeps over all groups and updates the arguments in place.

    Args:
        errors: [columns, rows] float32, Eᵀ: the weights minus the quantised weights.
        codes: [columns, rows] float32.
        scales, biases: [groups, rows] float32.
        moments: [columns, columns] float32.
        dtype: dtype of the stored scales and biases.
    """
    size = len(codes) // len(scales)
    for _ in range(_SWEEPS):
        for group in range(len(scales)):
            mine = slice(group * size, (group + 1) * size)
            gradient, own = moments[mine] @ errors, moments[mine, mine]
            change = _better_codes(gradient, codes[mine], scales[group], own, bits)
            errors[mine] += change
            gradient += own @ change
            change = _better_grid(gradient, codes[mine], scales[group], biases[group], own, dtype)
            errors[mine] += change


def _better_codes(
    gradient: np.ndarray, codes: np.ndarray, scales: np.ndarray, own: np.ndarray, bits: int
) -> np.ndarray:
    """Improves the codes of one group, a column at a time. Returns the change of its errors, [size, rows]."""
    change = np.zeros_like(codes)
    for j in range(len(codes)):
        slope = gradient[j] + own[j, :j] @ change[:j]
        best = np.clip(np.rint(codes[j] + slope / (own[j, j] * scales)), 0, 2**bits - 1)
        change[j] = (codes[j] - best) * scales
        codes[j] = best
    return change


def _better_grid(
    gradient: np.ndarray, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, own: np.ndarray, dtype: str
) -> np.ndarray:
    """Sets the scale and bias of one group to their least squares fit. Returns the change of its errors."""
    sums = own.sum(axis=0)
    a = (codes * (own @ codes)).sum(axis=0)  # the quadratic form is [[a, b], [b, c]], the linear one [p, q]
    b, c = sums @ codes, sums.sum()
    p, q = (gradient * codes).sum(axis=0), gradient.sum(axis=0)
    determinant = a * c - b * b
    regular = determinant > 1e-6 * a * c
    divisor = np.where(regular, determinant, 1)
    new_scales = representable(scales + np.where(regular, (p * c - q * b) / divisor, 0), dtype)
    new_biases = representable(biases + np.where(regular, (q * a - p * b) / divisor, 0), dtype)
    ds, db = new_scales - scales, new_biases - biases
    change = a * ds * ds + 2 * b * ds * db + c * db * db - 2 * (p * ds + q * db)
    better = (change < 0) & (new_scales != 0)
    ds, db = np.where(better, ds, 0), np.where(better, db, 0)
    scales += ds
    biases += db
    return -(codes * ds + db)
