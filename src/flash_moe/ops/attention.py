"""Causal grouped-query attention over a KV cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .blas import to_numpy, use_blas

_SCORES = 1 << 24  # computed at a time on the CPU: 64 MiB


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Softmax attention in which the last query sees all keys and each earlier one a key less.

    Args:
        q: [Hq, T, D] queries of the newest T tokens.
        k, v: [Hkv, S, D] keys and values of all S >= T tokens; query heads share KV heads in groups.
        scale: factor on the scores, 1 / sqrt(D).

    Returns:
        [Hq, T, D].
    """
    if use_blas(q.shape[1], q.dtype):
        return _blas_attention(q, k, v, scale)
    mask = "causal" if q.shape[1] > 1 else None
    return mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, mask=mask)[0]


def _blas_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    heads, tokens, dim = q.shape
    kv_heads, context, _ = k.shape
    keys, values = to_numpy(k), to_numpy(v)
    queries = to_numpy(q).reshape(kv_heads, heads // kv_heads, tokens, dim)
    out = np.empty((kv_heads, heads // kv_heads, tokens, dim), np.float32)
    step = max(1, _SCORES // (kv_heads * context))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        hidden = np.arange(context) > np.arange(context - tokens, context)[rows, None]
        for head in range(heads // kv_heads):
            scores = np.matmul(queries[:, head, rows] * scale, keys.transpose(0, 2, 1))
            scores[:, hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, values, out=out[:, head, rows])
    return mx.array(out.reshape(heads, tokens, dim))
