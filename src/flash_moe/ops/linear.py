"""Linear layers: x · Wᵀ (+ bias), with W plain or quantised."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..formats import Quantization
from . import kernel
from .blas import matmul, to_numpy, use_blas
from .dispatch import use_kernel
from .quantized_matvec import quantized_matvec, supports

_BLOCK_WEIGHTS = 1 << 24  # weights that are dequantised together on the CPU: 64 MiB of float32


def linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    quantization: Quantization | None = None,
) -> mx.array:
    """Multiplies each row of x with a stored [out, in] matrix.

    Args:
        x: [T, in], float.
        weight: [out, in] float, or [out, in · bits / 32] uint32 when quantised.
        scales, biases: [out, in / group_size], the dtype of x; None if W is not quantised. In modes other than affine,
            scales are uint8 and biases are None.

    Returns:
        [T, out], the dtype of x.
    """
    if quantization is None or scales is None:
        return matmul(x, weight.T)
    if use_blas(x.shape[0], x.dtype):
        return _blas_quantized(x, weight, scales, biases, quantization)
    if biases is None:
        return mx.quantized_matmul(x, weight, scales, transpose=True, **quantization.to_json())
    group_size = quantization.group_size
    tokens, columns = x.shape
    sizes = tokens, columns, weight.shape[0], quantization.bits, group_size, x.dtype, scales.dtype
    if supports(x, weight, quantization) and use_kernel("quantized_matvec", *sizes):
        return quantized_matvec(x, weight, scales, biases, quantization)
    if group_size == columns and kernel.back_end() == "cuda":
        # MLX 0.32.4 on Hopper is wrong if a row of the matrix is a single group
        return x @ dequantized(weight, scales, biases, quantization, x.dtype).T
    if group_size == 128 and x.dtype == mx.float32 and kernel.back_end() == "cuda":
        # MLX 0.32.4 requests more shared memory than a block may have; both halves of a group have its scale and bias
        group_size, scales, biases = 64, mx.repeat(scales, 2, axis=-1), mx.repeat(biases, 2, axis=-1)
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=quantization.bits)


def dequantized(
    weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization, dtype: mx.Dtype
) -> mx.array:
    """Returns the weights [out, in] in ``dtype``."""
    return mx.dequantize(weight, scales, biases, **quantization.to_json(), dtype=dtype)


def _blas_quantized(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, q: Quantization
) -> mx.array:
    """Dequantises a block of rows at a time and multiplies with BLAS, so that memory stays bounded."""
    rows, out = to_numpy(x), np.empty((x.shape[0], weight.shape[0]), np.float32)
    step = max(1, _BLOCK_WEIGHTS // x.shape[1])
    for i in range(0, weight.shape[0], step):
        block = slice(i, i + step)
        w = dequantized(weight[block], scales[block], None if biases is None else biases[block], q, x.dtype)
        np.matmul(rows, to_numpy(w).T, out=out[:, block])
    return mx.array(out)
