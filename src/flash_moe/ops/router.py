"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import mlx.core as mx


def route(logits: mx.array, k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """Softmax over all experts in float32, then the K largest.

    Args:
        logits: [T, E], any float dtype.
        k: experts per token, 1 <= k <= E.
        normalize: whether the K weights are rescaled to sum to one.

    Returns:
        ids [T, K] uint32, in no particular order, and weights [T, K] float32. NaN logits give NaN weights.

    Source: transformers, ``Qwen3_5MoeTopKRouter``.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    ids = mx.argpartition(-probabilities, kth=k - 1, axis=-1)[:, :k]
    weights = mx.take_along_axis(probabilities, ids, axis=-1)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights
