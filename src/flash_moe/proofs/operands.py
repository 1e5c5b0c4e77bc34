"""Random operands for the trials of kernels, and products in float32 to compare with."""

from __future__ import annotations

import mlx.core as mx

from ..formats import Quantization


def dtype_of(name: str) -> mx.Dtype:
    return {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[name]


def random(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape)).astype(dtype)


def codes(rows: int, columns: int, bits: int) -> mx.array:
    """Returns random packed weights: [rows, columns · bits / 32] uint32."""
    shape = (rows, columns * bits // 32)
    return mx.random.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=mx.int32).view(mx.uint32)


def scales_of(rows: int, columns: int, q: Quantization, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Returns scales and biases that give the weights a mean of zero and products the size of their inputs."""
    shape, size = (rows, columns // q.group_size), columns**-0.5 / (1 << (q.bits - 1))
    scales = (size * (1 + mx.random.uniform(shape=shape))).astype(dtype)
    biases = scales.astype(mx.float32) * -((1 << q.bits) - 1) / 2 + random(*shape, scale=0.1 * columns**-0.5)
    return scales, biases.astype(dtype)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """Returns [T, in] times [out, in] in float32 through sums, because matrix products may use fewer bits."""
    return mx.concatenate([(matrix * row).sum(axis=-1)[None] for row in x.astype(mx.float32)])
