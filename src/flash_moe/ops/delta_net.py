"""Gated DeltaNet between its input and output projections, with MLX's ops."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .causal_conv import causal_conv
from .gated_delta import gated_delta, gated_delta_step, steps
from .norm import l2_norm, rms_norm


def delta_net(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, qk_scale: mx.array, log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array,
    l2_eps: float, eps: float,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """Returns norm(gated_delta(conv(qkv))) · silu(z) for T tokens.

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
        l2_eps: epsilon of the norms of q and k. eps: epsilon of the output norm.

    Returns:
        y [T, Hv · Dv] in the dtype of qkv, and the new conv_state and state.
    """
    mixed, conv_state = causal_conv(qkv, conv_weight, conv_state)
    inputs = _inputs(mixed, b, a, state.shape, qk_scale, log_decay, dt_bias, l2_eps, steps(qkv.shape[0]))
    y, state = (gated_delta_step if steps(qkv.shape[0]) else gated_delta)(*inputs, state)
    return _gated(y, z, norm_weight, eps, qkv.dtype), conv_state, state


def delta_net_of_each(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, conv_states: Sequence[mx.array], states: Sequence[mx.array], *,
    conv_weight: mx.array, qk_scale: mx.array, log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array,
    l2_eps: float, eps: float,
) -> tuple[mx.array, list[mx.array], list[mx.array]]:  # fmt: skip
    """Returns :func:`delta_net` for one token of each of N sequences.

    Args:
        qkv, z, b, a: one row per sequence.
        conv_states, states: N states each.
    """
    count = qkv.shape[0]
    inputs = mx.concatenate([mx.stack(list(conv_states)), qkv[:, None]], axis=1)  # [N, taps, C]
    mixed = (inputs * conv_weight).sum(axis=1)
    rows = _inputs(mixed * mx.sigmoid(mixed), b, a, states[0].shape, qk_scale, log_decay, dt_bias, l2_eps, False)
    of_each = zip(*(mx.split(array, count) for array in rows), states, strict=True)
    found = [gated_delta(*arrays) for arrays in of_each]
    y = mx.concatenate([y for y, _ in found])
    convs = [conv[0] for conv in mx.split(inputs[:, 1:], count)]
    return _gated(y, z, norm_weight, eps, qkv.dtype), convs, [state for _, state in found]


def _inputs(
    mixed: mx.array, b: mx.array, a: mx.array, state_shape: tuple[int, ...], qk_scale: mx.array, log_decay: mx.array,
    dt_bias: mx.array, l2_eps: float, step: bool,
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:  # fmt: skip
    """Returns q, k, v, decay and beta for :func:`gated_delta` or :func:`gated_delta_step`."""
    tokens, (heads, dv, dk) = mixed.shape[0], state_shape
    qk, v = mx.split(mixed, [mixed.shape[1] - heads * dv], axis=-1)
    qk, v = l2_norm(qk.reshape(tokens, 2, -1, dk), l2_eps) * qk_scale, v.reshape(tokens, heads, dv)
    if step:  # reshaped and converted here, where a trace fuses this with adjacent ops
        qk, shape = qk.astype(mx.float32), (qk.shape[2], -1, 1, 1)
        a, b, dt_bias, log_decay = (array.reshape(shape) for array in (a, b, dt_bias, log_decay))
    dt = mx.logaddexp(a.astype(mx.float32) + dt_bias, 0.0)  # softplus
    decay, beta = mx.exp(dt * log_decay), mx.sigmoid(b)
    return qk[:, 0], qk[:, 1], v, decay, beta


def _gated(y: mx.array, z: mx.array, norm_weight: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """Returns norm(y) · silu(z): [T, Hv, Dv] to [T, Hv · Dv]."""
    # MLX would convert a weight of another dtype in a separate launch
    y = rms_norm(y, norm_weight, eps) if y.dtype == norm_weight.dtype else rms_norm(y, None, eps) * norm_weight
    shape, z = z.shape, z.reshape(y.shape).astype(mx.float32)
    return (y * (z * mx.sigmoid(z))).astype(dtype).reshape(shape)
