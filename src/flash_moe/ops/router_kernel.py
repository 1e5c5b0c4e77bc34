"""Softmax and top-K of the router in one launch (``kernels/router.metal``)."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from .kernel import SIMD, Kernel

MAX_EXPERTS = 1024  # a lane keeps E / 32 logits in registers
MAX_K = SIMD  # a lane writes one choice


def supports(logits: mx.array, k: int) -> bool:
    """Returns whether :func:`route` supports these arguments."""
    return logits.shape[-1] <= MAX_EXPERTS and k <= MAX_K


@cache
def _kernel(shared: bool) -> Kernel:
    inputs, value = (["logits", "shared_logits"], "float(shared_logits[t])") if shared else (["logits"], "0.0f")
    defines = f"#define SHARED_LOGIT(t) {value}\n"
    return Kernel("router", inputs, ["ids", "weights"], headers=["order_key"], defines=defines)


def route(
    logits: mx.array, k: int, normalize: bool, shared_logits: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Computes a softmax over all experts and chooses the K largest, with the contract of :func:`.router.route`.

    Args:
        logits: [T, E], any float dtype, E <= 1024.
        k: experts per token, 1 <= k <= min(E, 32).
        normalize: whether the K weights are rescaled to sum to one.
        shared_logits: [T, 1], logits of the shared expert's gate; None without it.

    Returns:
        ids [T, K] uint32 in descending order of weight (for equal weights, the lower id first), and weights [T, K]
            float32, followed by sigmoid(shared_logits) if given. NaN logits give NaN weights.
    """
    tokens, experts = logits.shape
    shared = shared_logits is not None
    ids, weights = _kernel(shared)(
        [logits, *([] if shared_logits is None else [shared_logits])],
        template=[("E", experts), ("K", k), ("NORMALIZE", normalize), ("SHARED", int(shared))],
        grid=(tokens * SIMD, 1, 1),
        threadgroup=(SIMD, 1, 1),
        output_shapes=[(tokens, k), (tokens, k + shared)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, weights
