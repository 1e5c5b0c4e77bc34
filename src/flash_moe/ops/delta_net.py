"""Gated DeltaNet from its input projections to the input of its output projection, by MLX's ops."""

from __future__ import annotations

import mlx.core as mx

from .causal_conv import causal_conv
from .gated_delta import gated_delta, gated_delta_step, steps
from .norm import l2_norm, rms_norm


def delta_net(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, qk_scale: mx.array, log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array,
    l2_eps: float, eps: float,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """norm(gated_delta(conv(qkv))) · silu(z) for T tokens.

    Args:
        qkv: [T, C], C = 2 · Hk · Dk + Hv · Dv.
        z: [T, Hv · Dv].
        b, a: [T, Hv], before the sigmoid of the writing strength and the softplus of the decay.
        conv_state: [taps - 1, C].
        state: [Hv, Dv, Dk] float32.
        conv_weight: [taps, C].
        qk_scale: [2, 1, 1], factors on the normalised q and k.
        log_decay, dt_bias: [Hv].
        norm_weight: [Dv].
        l2_eps, eps: of the norms of q and k, and of the output.

    Returns:
        y [T, Hv · Dv] in the dtype of qkv, and the new conv_state and state.
    """
    tokens, (heads, dv, dk) = qkv.shape[0], state.shape
    mixed, conv_state = causal_conv(qkv, conv_weight, conv_state)
    qk, v = mx.split(mixed, [mixed.shape[1] - heads * dv], axis=-1)
    qk, v = l2_norm(qk.reshape(tokens, 2, -1, dk), l2_eps) * qk_scale, v.reshape(tokens, heads, dv)
    step = steps(tokens)
    if step:  # shaped and converted where a trace makes one launch of it and of its neighbours
        qk, shape = qk.astype(mx.float32), (qk.shape[2], -1, 1, 1)
        a, b, dt_bias, log_decay = (array.reshape(shape) for array in (a, b, dt_bias, log_decay))
    dt = mx.logaddexp(a.astype(mx.float32) + dt_bias, 0.0)  # softplus
    decay, beta = mx.exp(dt * log_decay), mx.sigmoid(b)
    y, state = (gated_delta_step if step else gated_delta)(qk[:, 0], qk[:, 1], v, decay, beta, state)
    # MLX would convert a weight of another dtype in a launch of its own
    y = rms_norm(y, norm_weight, eps) if y.dtype == norm_weight.dtype else rms_norm(y, None, eps) * norm_weight
    z = z.reshape(tokens, heads, dv).astype(mx.float32)
    return (y * (z * mx.sigmoid(z))).astype(qkv.dtype).reshape(tokens, heads * dv), conv_state, state
