"""The router: chooses the experts of a token and their weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from . import router_kernel
from .blas import on_cpu, to_numpy
from .dispatch import use_kernel


def route(
    logits: mx.array, k: int, normalize: bool, shared_logits: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Computes a softmax over all experts in float32, and chooses the K largest.

    Args:
        logits: [T, E], any float dtype.
        k: experts per token, 1 <= k <= E.
        normalize: whether the K weights are rescaled to sum to one.
        shared_logits: [T, 1], logits of the shared expert's gate; None without it.

    Returns:
        ids [T, K] uint32, in no particular order, and weights [T, K] float32, followed by sigmoid(shared_logits) if
            given. NaN logits give NaN weights.

    Source: transformers, ``Qwen3_5MoeTopKRouter``.
    """
    sizes = logits.shape[-1], k, int(normalize), int(shared_logits is not None), logits.dtype
    if router_kernel.supports(logits, k) and use_kernel("router", *sizes):
        return router_kernel.route(logits, k, normalize, shared_logits)
    ids, weights = (_numpy_route if on_cpu(logits.dtype) else _mlx_route)(logits, k, normalize)
    if shared_logits is not None:
        weights = mx.concatenate([weights, mx.sigmoid(shared_logits.astype(mx.float32))], axis=-1)
    return ids, weights


def _mlx_route(logits: mx.array, k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    values = logits if normalize else mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    ids = mx.argpartition(values, kth=-k, axis=-1)[:, -k:]  # NaN sorts last, so it is among the chosen and propagates
    weights = mx.take_along_axis(values, ids, axis=-1)
    if normalize:  # the softmax over all, divided by the sum of the chosen, is the softmax over the chosen
        weights = mx.softmax(weights.astype(mx.float32), axis=-1, precise=True)
    return ids, weights


def _numpy_route(array: mx.array, k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """Routes on the CPU in a few NumPy calls, because the host needs the ids next."""
    logits = to_numpy(array)
    ids = np.argpartition(logits, -k, axis=-1)[:, -k:]
    top = logits[np.arange(len(logits))[:, None], ids]
    largest = top.max(axis=-1, keepdims=True)  # NaN sorts last, so it is among the chosen and propagates
    weights = np.exp(top - largest)
    total = weights if normalize else np.exp(logits - largest)
    weights /= total.sum(axis=-1, keepdims=True)
    return mx.array(ids.astype(np.uint32)), mx.array(weights)
