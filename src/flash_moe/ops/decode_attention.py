"""Gated attention of one new token over a KV cache, split over the context.

Kernels: ``decode_attention.metal`` and ``decode_attention_combine.metal``; notes in docs/kernels.md.
"""

from __future__ import annotations

import mlx.core as mx

from .attention import attention
from .kernel import Kernel, Template
from .scalars import floats, integers

_THREADS = 256  # of a threadgroup of the first kernel, as in its source
_TILE = 32  # keys that it takes at a time
_CHUNK = 64  # fewest keys of a threadgroup: below, its partial sums weigh as much as its keys and values
_THREADGROUPS = 128  # enough to fill the GPUs that this runs on
_COMBINE_THREADS = 64
_SHARED_FLOATS = 8192  # 32 KiB of threadgroup memory

_PARTIAL = Kernel("decode_attention", ["q", "keys", "values", "scale", "sizes"], ["best", "total", "sums"])
_COMBINE = Kernel("decode_attention_combine", ["best", "total", "sums", "gate", "sizes"], ["y"])


def supports(heads: int, kv_heads: int, dim: int) -> bool:
    """Returns whether :func:`decode_attention_kernel` takes heads like these."""
    return dim % 32 == 0 and heads // kv_heads * (dim + 2 * _TILE + 1) <= _SHARED_FLOATS


def decode_attention_reference(
    q: mx.array, keys: mx.array, values: mx.array, length: int, gate: mx.array, scale: float
) -> mx.array:
    """Returns softmax(scale · q · kᵀ) · v · sigmoid(gate) for one token, in float32.

    Args:
        q: [Hq, 1, D]; query heads share KV heads in groups of Hq / Hkv.
        keys, values: [..., Hkv, capacity, D] with leading axes of 1, the whole buffers of the cache, dtype of q.
        length: tokens in the cache, the new one included, at least 1; rows beyond are not read.
        gate: [1, Hq · D].
        scale: factor on the scores, 1 / sqrt(D).

    Returns:
        [1, Hq · D] in the dtype of q.
    """
    k, v = (a.reshape(a.shape[-3:])[:, :length].astype(mx.float32) for a in (keys, values))
    y = attention(q.astype(mx.float32), k, v, scale).reshape(gate.shape)
    return (y * mx.sigmoid(gate.astype(mx.float32))).astype(q.dtype)


def cache_sizes(length: int, keys: mx.array) -> mx.array:
    """Returns what :func:`decode_attention_kernel` reads of a cache at run time: valid keys, capacity, chunk size,
    chunks.
    """
    kv_heads, capacity = keys.shape[-3:-1]
    return integers(length, capacity, *split(capacity, kv_heads))


def decode_attention_kernel(
    q: mx.array, keys: mx.array, values: mx.array, sizes: mx.array, gate: mx.array, scale: float
) -> mx.array:
    """As :func:`decode_attention_reference`, by the kernels; D is a multiple of 32.

    Args:
        sizes: of the cache; see :func:`cache_sizes`. An array, so that a trace serves every length.

    Raises:
        ValueError: When D or the number of query heads per KV head does not suit the kernel.
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
    """Returns keys per chunk, a multiple of the tile, and the number of chunks; those beyond the valid keys stay empty."""
    most = max(1, _THREADGROUPS // kv_heads)
    chunk = max(_CHUNK, -(-capacity // (most * _TILE)) * _TILE)
    return chunk, -(-capacity // chunk)
