"""Gated attention of one new token over a KV cache, split over the context.

Kernels: ``decode_attention.metal`` and ``decode_attention_combine.metal``; notes in docs/kernels.md.
"""

from __future__ import annotations

import mlx.core as mx

from .attention import attention
from .kernel import Kernel, Template
from .scalars import floats, integers

_THREADS = 256  # threads of a threadgroup of the first kernel, as in its source
_TILE = 32  # keys of a tile
_CHUNK = 64  # minimum keys of a threadgroup; with fewer, partial sums take as many bytes as keys and values
_THREADGROUPS = 128  # enough threadgroups to fill current GPUs
_COMBINE_THREADS = 64
_SHARED_FLOATS = 8192  # 32 KiB of threadgroup memory

_PARTIAL = Kernel("decode_attention", ["q", "keys", "values", "scale", "sizes"], ["best", "total", "sums"])
_COMBINE = Kernel("decode_attention_combine", ["best", "total", "sums", "gate", "sizes"], ["y"])


def supports(heads: int, kv_heads: int, dim: int) -> bool:
    """Returns whether :func:`decode_attention_kernel` supports these heads."""
    return dim % 32 == 0 and heads // kv_heads * (dim + 2 * _TILE + 1) <= _SHARED_FLOATS


def decode_attention_reference(
    q: mx.array, keys: mx.array, values: mx.array, length: int, gate: mx.array, scale: float
) -> mx.array:
    """Returns softmax(scale · q · kᵀ) · v · sigmoid(gate) for one token, in float32.

    Args:
        q: [Hq, 1, D]; query heads share KV heads in groups of Hq / Hkv.
        keys, values: [..., Hkv, capacity, D] with leading axes of 1, the whole buffers of the cache, dtype of q.
        length: number of tokens in the cache, including the new one, at least 1. Later rows are not read.
        gate: [1, Hq · D].
        scale: factor on the scores, 1 / sqrt(D).

    Returns:
        [1, Hq · D] in the dtype of q.
    """
    k, v = (a.reshape(a.shape[-3:])[:, :length].astype(mx.float32) for a in (keys, values))
    y = attention(q.astype(mx.float32), k, v, scale).reshape(gate.shape)
    return (y * mx.sigmoid(gate.astype(mx.float32))).astype(q.dtype)


def cache_sizes(length: int, keys: mx.array) -> mx.array:
    """Returns the sizes that :func:`decode_attention_kernel` reads at run time: valid keys, capacity, chunk size,
    chunks.
    """
    kv_heads, capacity = keys.shape[-3:-1]
    return integers(length, capacity, *split(capacity, kv_heads))


def decode_attention_kernel(
    q: mx.array, keys: mx.array, values: mx.array, sizes: mx.array, gate: mx.array, scale: float
) -> mx.array:
    """Computes :func:`decode_attention_reference` with the kernels; D must be a multiple of 32.

    Args:
        sizes: result of :func:`cache_sizes`. It is an array, so that one trace serves every length.

    Raises:
        ValueError: the kernel does not support D or the number of query heads per KV head.
    """
    (heads, _, dim), (kv_heads, capacity) = q.shape, keys.shape[-3:-1]
    group = heads // kv_heads
    if not supports(heads, kv_heads, dim):
        raise ValueError(
            f"decode_attention: found {group} query heads of {dim} elements per KV head; expected a multiple of 32 "
            f"elements, and at most {_SHARED_FLOATS // (dim + 2 * _TILE + 1)} heads; use attention() instead"
        )
    _, chunks = split(capacity, kv_heads)
    common: Template = [("T", q.dtype), ("D", dim)]
    partial = _PARTIAL(
        [q, keys, values, floats(scale), sizes],
        template=[*common, ("HKV", kv_heads), ("GROUP", group)],
        grid=(chunks * _THREADS, kv_heads, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(heads, chunks), (heads, chunks), (heads, chunks, dim)],
        output_dtypes=[mx.float32] * 3,
    )
    (y,) = _COMBINE(
        [*partial, gate, sizes],
        template=[*common, ("HQ", heads)],
        grid=(-(-heads * dim // _COMBINE_THREADS) * _COMBINE_THREADS, 1, 1),
        threadgroup=(_COMBINE_THREADS, 1, 1),
        output_shapes=[(1, heads * dim)],
        output_dtypes=[q.dtype],
    )
    return y


def split(capacity: int, kv_heads: int) -> tuple[int, int]:
    """Returns the keys per chunk, a multiple of the tile, and the number of chunks.

    Chunks past the valid keys are empty.
    """
    most = max(1, _THREADGROUPS // kv_heads)
    chunk = max(_CHUNK, -(-capacity // (most * _TILE)) * _TILE)
    return chunk, -(-capacity // chunk)
