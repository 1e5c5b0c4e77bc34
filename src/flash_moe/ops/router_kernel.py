"""Softmax and top-K of the router in one launch (``kernels/router.metal``)."""

from __future__ import annotations

import mlx.core as mx

from .kernel import SIMD, Kernel

MAX_EXPERTS = 1024  # a lane keeps E / 32 logits in registers
MAX_K = SIMD  # a lane writes one choice

_kernel = Kernel("router", ["logits"], ["ids", "weights"], headers=["order_key"])


def supports(logits: mx.array, k: int) -> bool:
    """Whether :func:`route` takes these."""
    return logits.shape[-1] <= MAX_EXPERTS and k <= MAX_K


def route(logits: mx.array, k: int, normalize: bool) -> tuple[mx.array, mx.array]:
    """Softmax over all experts in float32, then the K largest; the contract of :func:`.router.route`.

    Args:
        logits: [T, E], any float dtype, E <= 1024.
        k: experts per token, 1 <= k <= min(E, 32).
        normalize: whether the K weights are rescaled to sum to one.

    Returns:
        ids [T, K] uint32 in descending order of weight, of equal ones the lower first, and weights [T, K] float32.
        NaN logits give NaN weights.
    """
    tokens, experts = logits.shape
    ids, weights = _kernel(
        [logits],
        template=[("E", experts), ("K", k), ("NORMALIZE", normalize)],
        grid=(tokens * SIMD, 1, 1),
        threadgroup=(SIMD, 1, 1),
        output_shapes=[(tokens, k)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, weights
