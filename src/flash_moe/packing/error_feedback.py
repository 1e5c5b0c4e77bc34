"""Quantises a matrix with minimal change of its outputs: each column compensates for earlier errors.

Let E = W − Ŵ, and let H be the second moments of the inputs. The mean squared change of the outputs is tr(E H Eᵀ). With
H = U D Uᵀ and U unit upper triangular, it equals Σ_k D_k ‖e_k + Σ_{j<k} U_jk e_j‖². So the best rounding of column k is
that of w_k + Σ_{j<k} U_jk e_j. This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the equivalent form of Chee et
al. (2023, arXiv:2307.13304), which needs one Cholesky factorisation and no inverse.
"""

from __future__ import annotations

import numpy as np

from ..formats import Quantization
from .affine import Affine
from .descent import descend
from .rounding import search


def quantized(weights: np.ndarray, moments: np.ndarray, quantization: Quantization, dtype: str) -> Affine:
    """Quantises a matrix for inputs with the given second moments. The columns keep their order.

    It searches for the scale and bias of a group when it reaches the group, and weights errors by their effect on the
    outputs. At the end, it improves codes, scales and biases once more by coordinate descent.

    Args:
        weights: [rows, columns] float32.
        moments: [columns, columns] float64, positive definite.
        dtype: dtype of the stored scales and biases.

    Returns:
        The quantised groups, [rows, columns / group_size].
    """
    size, (rows, columns) = quantization.group_size, weights.shape
    upper, conditional = _unit_upper(moments)
    columns_first = np.ascontiguousarray(weights.T)
    errors, codes = np.zeros((columns, rows), np.float32), np.empty((columns, rows), np.float32)
    scales, biases = np.empty((2, columns // size, rows), np.float32)
    for group, start in enumerate(range(0, columns, size)):
        mine = slice(start, start + size)
        wanted = columns_first[mine] + upper[:start, mine].T @ errors[:start]
        found = search(np.ascontiguousarray(wanted.T), quantization.bits, dtype, conditional[mine])
        scales[group], biases[group] = found.scales, found.biases
        _round_in_turn(
            columns_first[mine], wanted, errors[mine], codes[mine], found.scales, found.biases, upper[mine, mine],
            quantization.bits,
        )  # fmt: skip
    descend(errors, codes, scales, biases, moments.astype(np.float32), quantization.bits, dtype)
    return Affine(codes.T.astype(np.uint8).reshape(rows, -1, size), scales.T.copy(), biases.T.copy())


def _unit_upper(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns U and the diagonal of D in H = U D Uᵀ, float32, from a Cholesky factorisation in reverse order."""
    factor = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    diagonal = np.diag(factor)
    return (factor / diagonal).astype(np.float32), np.square(diagonal).astype(np.float32)


def _round_in_turn(
    weights: np.ndarray,
    wanted: np.ndarray,
    errors: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    upper: np.ndarray,
    bits: int,
) -> None:
    """Computes the codes and errors of one group, [size, rows], a column at a time."""
    for j in range(len(weights)):
        column = wanted[j] + upper[:j, j] @ errors[:j]
        codes[j] = np.clip(np.rint((column - biases) / scales), 0, 2**bits - 1)
        errors[j] = weights[j] - (codes[j] * scales + biases)
