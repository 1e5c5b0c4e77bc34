"""Causal grouped-query attention over a KV cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .blas import to_numpy, use_blas

_QUERIES = 256  # queries that are computed together on the CPU


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Returns causal softmax attention: the last query attends to all keys, and each earlier one to one key less.

    Args:
        q: [Hq, T, D] queries of the newest T tokens.
        k, v: [Hkv, S, D] keys and values of all S >= T tokens. Query heads share KV heads in groups.
        scale: factor on the scores, 1 / sqrt(D).

    Returns:
        [Hq, T, D].
    """
    if use_blas(q.shape[1], q.dtype):
        return _blas_attention(q, k, v, scale)
    mask = "causal" if q.shape[1] > 1 else None
    return mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, mask=mask).squeeze(0)


def _blas_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Computes attention for blocks of queries with their visible keys, so that scores stay in the cache and half of
    them are skipped.
    """
    heads, tokens, dim = q.shape
    kv_heads, context, _ = k.shape
    group = heads // kv_heads
    keys, values = to_numpy(k).transpose(0, 2, 1), to_numpy(v)
    queries = to_numpy(q).reshape(kv_heads, group, tokens, dim)
    out = np.empty(queries.shape, np.float32)
    for start in range(0, tokens, _QUERIES):
        stop = min(start + _QUERIES, tokens)
        seen, count = context - tokens + stop, stop - start
        ahead = ~np.tri(count, dtype=bool)  # masks the keys of the block that a query must not attend to
        for kv_head in range(kv_heads):
            for head in range(group):
                scores = (queries[kv_head, head, start:stop] * scale) @ keys[kv_head, :, :seen]
                scores[:, -count:][ahead] = -np.inf
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                total = scores.sum(axis=-1, keepdims=True)
                np.divide(scores @ values[kv_head, :seen], total, out=out[kv_head, head, start:stop])
    return mx.array(out.reshape(heads, tokens, dim))
