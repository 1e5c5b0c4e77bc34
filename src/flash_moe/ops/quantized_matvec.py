"""x · Wᵀ for a few tokens with W affinely quantised, in one kernel (``kernels/quantized_matvec.metal``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ..record import Quantization
from .kernel import SIMD, Kernel

NAIVE, FUSED, HOISTED = range(3)  # enum Form of kernels/quantized.h.metal
MAX_TOKENS = 8  # what the accumulators of a thread have room for
MAX_MATRICES = 7  # of a launch: with x, three inputs and an output each, Metal's 31 buffers hold no more
_BLOCK = 32  # weights a lane reads at once
_SIMDGROUPS = 2  # per threadgroup
_SMALLEST = 8  # elements; Metal gives a kernel smaller buffers in another address space
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Matrix(NamedTuple):
    """A stored matrix: [out, in] float, or [out, in · bits / 32] uint32 with [out, in / group_size] scales and biases."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: Quantization | None = None


def lanes_per_row(columns: int, choices: Sequence[int] = (16, 8)) -> int:
    """How many lanes share a row: of the choices the first that leaves fewest idle in the last round."""
    blocks = columns // _BLOCK

    def used(lanes: int) -> float:
        return blocks / (-(-blocks // lanes) * lanes)

    return max(choices, key=used)


def _rows(tokens: int, out: int) -> int:
    """Rows of a set of lanes: many share the reading of x, but enough sets must be left to fill the GPU."""
    if tokens > 1:
        return 4 if tokens <= 4 else 2
    return 8 if out >= 8192 else 4 if out >= 2048 else 2


def supports(x: mx.array, weight: mx.array, quantization: Quantization | None) -> bool:
    """Whether :func:`quantized_matvec` takes these: few tokens, and a matrix of more than a toy's size."""
    return quantization is not None and x.dtype in _FLOATS and x.shape[0] <= MAX_TOKENS and weight.size >= _SMALLEST


def together(a: Matrix, b: Matrix) -> bool:
    """Whether :func:`quantized_matvecs` takes both in one launch: quantised alike, and neither a toy."""
    if a.quantization is None or a.quantization != b.quantization or a.scales is None or b.scales is None:
        return False
    return a.scales.dtype == b.scales.dtype and min(a.scales.size, b.scales.size) >= _SMALLEST


def quantized_matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    quantization: Quantization,
    *,
    form: int = HOISTED,
) -> mx.array:
    """Multiplies each row of x with a stored [out, in] matrix; the contract of :func:`.linear.linear`.

    Args:
        x: [T, in], float, T <= 8; its memory starts at a multiple of 16 bytes.
        weight: [out, in · bits / 32] uint32, likewise aligned.
        scales, biases: [out, in / group_size], any float dtype.
        form: how a weight is multiplied; all sum in float32.

    Returns:
        [T, out], the dtype of x.
    """
    (y,) = quantized_matvecs(x, [Matrix(weight, scales, biases, quantization)], form=form)
    return y


def quantized_matvecs(x: mx.array, matrices: Sequence[Matrix], *, form: int = HOISTED) -> list[mx.array]:
    """As :func:`quantized_matvec` for up to 7 matrices that are :func:`together`, in one launch.

    Returns:
        One [T, out] per matrix.
    """
    tokens, columns = x.shape
    outs = [matrix.weight.shape[0] for matrix in matrices]
    quantization = matrices[0].quantization
    assert quantization is not None
    lanes, rows = lanes_per_row(columns), _rows(tokens, sum(outs))
    threads = _SIMDGROUPS * SIMD
    firsts = [0]
    for out in outs:
        firsts.append(firsts[-1] + -(-out // (threads // lanes * rows)))
    return _kernel(len(matrices))(
        [x, *(part for matrix in matrices for part in matrix[:3] if part is not None)],
        template=[
            ("T", x.dtype), ("TOKENS", tokens), ("IN", columns), *((f"OUT{i}", out) for i, out in enumerate(outs)),
            *((f"FIRST{i}", first) for i, first in enumerate(firsts[:-1])), ("BITS", quantization.bits),
            ("GROUP", quantization.group_size), ("FORM", form), ("ROWS", rows), ("LANES", lanes),
        ],
        grid=(firsts[-1] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, out) for out in outs],
        output_dtypes=[x.dtype] * len(matrices),
    )  # fmt: skip


@cache
def _kernel(count: int) -> Kernel:
    """The kernel for ``count`` matrices; which one a threadgroup has is generated, as templates cannot choose buffers."""
    numbers = range(count)

    def choose(name: str, value: str) -> str:
        choices = "".join(f"(m) == {i} ? {value.format(i)} : " for i in numbers[:-1])
        return f"#define {name}(m) ({choices}{value.format(count - 1)})\n"

    matrix = "".join(f"(g) < uint(FIRST{i + 1}) ? {i}u : " for i in numbers[:-1])
    defines = f"#define MATRIX(g) ({matrix}{count - 1}u)\n" + "".join(
        choose(name, value)
        for name, value in (
            ("WEIGHT", "w{}"), ("SCALES", "scales{}"), ("BIASES", "biases{}"), ("OUTPUT", "y{}"),
            ("ROWS_OF", "uint(OUT{})"), ("FIRST", "uint(FIRST{})"),
        )
    )  # fmt: skip
    inputs = [f"{name}{i}" for i in numbers for name in ("w", "scales", "biases")]
    outputs = [f"y{i}" for i in numbers]
    return Kernel("quantized_matvec", ["x", *inputs], outputs, headers=["quantized"], defines=defines)
