"""Computes x · Wᵀ for a few tokens with affine W in one kernel (``kernels/quantized_matvec.metal``)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..formats import Quantization
from .kernel import SIMD, Kernel

NAIVE, FUSED, HOISTED = range(3)  # enum Form of kernels/quantized.h.metal
MAX_TOKENS = 8  # maximum tokens; the accumulators of a thread have no room for more
_BLOCK = 32  # weights that a lane reads together
_SIMDGROUPS = 2  # simdgroups per threadgroup
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)

_kernel = Kernel("quantized_matvec", ["x", "w", "scales", "biases"], ["y"], headers=["quantized"])


def lanes_per_row(columns: int, choices: Sequence[int] = (16, 8)) -> int:
    """Returns the number of lanes that share a row: the first choice with the fewest idle lanes in the last round."""
    blocks = columns // _BLOCK

    def used(lanes: int) -> float:
        return blocks / (-(-blocks // lanes) * lanes)

    return max(choices, key=used)


def _rows(tokens: int, out: int) -> int:
    """Returns the rows per set of lanes.

    More rows share the reads of x, but enough sets must remain to fill the GPU.
    """
    if tokens > 1:
        return 4 if tokens <= 4 else 2
    return 8 if out >= 8192 else 4 if out >= 2048 else 2


def supports(x: mx.array, weight: mx.array, quantization: Quantization | None) -> bool:
    """Returns whether :func:`quantized_matvec` supports these arguments: few tokens, and a matrix that is not tiny."""
    # in Metal, buffers of fewer than 8 elements are in another address space
    return (
        quantization is not None
        and quantization.is_affine
        and x.dtype in _FLOATS
        and x.shape[0] <= MAX_TOKENS
        and weight.size >= 8
    )


def quantized_matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    quantization: Quantization,
    *,
    form: int = HOISTED,
) -> mx.array:
    """Multiplies each row of x with a stored [out, in] matrix, with the contract of :func:`.linear.linear`.

    Args:
        x: [T, in], float, T <= 8. Its memory must start at a multiple of 16 bytes.
        weight: [out, in · bits / 32] uint32, with the same alignment.
        scales, biases: [out, in / group_size], any float dtype.
        form: form of the multiplication of a weight. All forms sum in float32.

    Returns:
        [T, out], the dtype of x.
    """
    tokens, columns = x.shape
    out = weight.shape[0]
    lanes, rows = lanes_per_row(columns), _rows(tokens, out)
    threads = _SIMDGROUPS * SIMD
    groups = -(-out // (threads // lanes * rows))
    (y,) = _kernel(
        [x, weight, scales, biases],
        template=[
            ("T", x.dtype), ("TOKENS", tokens), ("IN", columns), ("OUT", out), ("BITS", quantization.bits),
            ("GROUP", quantization.group_size), ("FORM", form), ("ROWS", rows), ("LANES", lanes),
        ],
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, out)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return y
