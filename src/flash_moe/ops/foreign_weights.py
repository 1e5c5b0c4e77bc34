"""Converts weights of other libraries: integers in another order, and e4m3 with scales."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..formats import FP8_BLOCK

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # column of the i-th integer of a word


def affine_of(
    order: str, bits: int, zero: int, rows: int, weight: mx.array, scales: mx.array, zeros: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Converts N matrices of integers to MLX's affine form.

    Args:
        order, bits, zero: as in :class:`~flash_moe.checkpoint.integers.IntegerForm`.
        rows: number of outputs of a matrix.
        weight, zeros: [N, words] uint32 in the stored order. Bytes after the zeros are ignored.
        scales: [N, rows · groups], float, in the stored order.

    Returns:
        weight [N, rows, words] uint32, scales and biases [N, rows, groups] in the dtype of the stored scales.
    """
    n = weight.shape[0]
    if order == "packed":
        scales = scales.reshape(n, rows, -1)
        return weight.reshape(n, rows, -1), scales, scales * -zero
    per_word = 32 // bits
    places = bits * np.argsort(_AWQ if order == "awq" else range(per_word))

    def unpacked(words: mx.array) -> mx.array:
        """Unpacks words [N, lines, words] to integers [N, lines, rows]."""
        codes = (words[..., None] >> mx.array(places.astype(np.uint32))) & (2**bits - 1)
        return codes.reshape(n, -1, rows)

    scales = scales.reshape(n, -1, rows)
    zeros = zeros[:, : scales.shape[1] * rows // per_word]
    integers = unpacked(zeros.reshape(n, -1, rows // per_word)) + zero
    biases = (scales.astype(mx.float32) * -integers.astype(mx.float32)).astype(scales.dtype)
    if order == "gptq":
        words = weight.reshape(n, -1, rows).swapaxes(1, 2)
    else:
        codes = unpacked(weight.reshape(n, -1, rows // per_word)).swapaxes(1, 2).reshape(n, rows, -1, per_word)
        words = (codes << mx.array((bits * np.arange(per_word)).astype(np.uint32))).sum(axis=-1).astype(mx.uint32)
    return words, scales.swapaxes(1, 2), biases.swapaxes(1, 2)


def from_fp8(codes: mx.array, scales: mx.array) -> mx.array:
    """Dequantises FP8 weights and rounds them to bfloat16, as the libraries do.

    Args:
        codes: [..., out, in] uint8, e4m3.
        scales: a scalar, or [..., a, b] float, where a is 1, ``out`` or the number of blocks of 128 rows, and b is the
            same for columns.

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
