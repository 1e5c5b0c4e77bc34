"""The Gated DeltaNet step of one token between its input and output projections.

Kernel: ``delta_net_step.metal``; notes in docs/kernels.md.
"""

from __future__ import annotations

import mlx.core as mx

from .causal_conv import causal_conv
from .gated_delta import gated_delta_reference
from .kernel import Kernel
from .norm_kernel import rms_norm_reference

THREADS = 512  # threads per value head: each has 8 float4 of a 128 × 128 state

_KERNEL = Kernel(
    "delta_net_step", ["projected", "constants", "conv_weight", "conv_state", "state"], ["y", "new_conv", "new_state"]
)

Step = tuple[mx.array, mx.array, mx.array]


def supports(key_dim: int) -> bool:
    """Returns whether :func:`delta_net_step_kernel` supports keys of this width."""
    return key_dim % 4 == 0


def pack_constants(
    log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array, *, l2_eps: float, eps: float
) -> mx.array:
    """Packs the constants of a layer into one array, because each input of a launch costs host time.

    Args:
        log_decay: [Hv], -exp(A_log).
        dt_bias: [Hv].
        norm_weight: [Dv], weight of the gated norm.
        l2_eps: added to Σq² and Σk².
        eps: epsilon of the gated norm.

    Returns:
        [2 · Hv + Dv + 2] float32.
    """
    arrays = [array.astype(mx.float32) for array in (log_decay, dt_bias, norm_weight)]
    return mx.concatenate([*arrays, mx.array([l2_eps, eps], dtype=mx.float32)])


def delta_net_step_reference(
    projected: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, constants: mx.array, key_heads: int,
) -> Step:  # fmt: skip
    """Returns y = norm(S · q) · silu(z) after S ← g·S, S ← S + β·(v − S·k)⊗k, in float32.

    q, k, v = silu(conv(qkv)), with q / |q| / sqrt(Dk) and k / |k|; g = exp(log_decay · softplus(a + dt_bias)) and β =
    sigmoid(b). Value heads share key heads in groups of Hv / Hk. Intermediate values are not rounded to the dtype of
    the input.

    Args:
        projected: [1, C + Hv · Dv + 2 · Hv], the outputs qkv, z, b and a of the input projections, one after the
            other, with C = 2 · Hk · Dk + Hv · Dv.
        conv_state: [taps - 1, C], qkv of the previous tokens.
        state: [Hv, Dv, Dk] float32.
        conv_weight: [taps, C], taps >= 2.
        constants: result of :func:`pack_constants`.
        key_heads: Hk.

    Returns:
        y [1, Hv · Dv] in the dtype of projected, and the new conv_state and state.
    """
    heads, dv, dk = state.shape
    channels, values = conv_state.shape[1], heads * dv
    qkv, z, b, a = mx.split(projected, [channels, channels + values, channels + values + heads], axis=-1)
    log_decay, dt_bias, norm_weight, epsilons = mx.split(constants, [heads, 2 * heads, 2 * heads + dv])
    l2_eps, eps = epsilons
    wide = [array.astype(mx.float32) for array in (qkv, conv_weight, conv_state)]
    mixed, _ = causal_conv(*wide)
    q, k, v = mx.split(mixed, [key_heads * dk, 2 * key_heads * dk], axis=-1)
    q, k = (array.reshape(1, key_heads, dk) for array in (q, k))
    q, k = (array * mx.rsqrt(mx.square(array).sum(axis=-1, keepdims=True) + l2_eps) for array in (q, k))
    dt = mx.logaddexp(a.astype(mx.float32) + dt_bias, 0.0)  # softplus
    beta = mx.sigmoid(b.astype(mx.float32))
    decay = mx.exp(dt * log_decay)
    y, new_state = gated_delta_reference(q * dk**-0.5, k, v.reshape(1, heads, dv), decay, beta, state)
    gate = z.astype(mx.float32)
    y = rms_norm_reference(y, norm_weight, eps).reshape(gate.shape) * gate * mx.sigmoid(gate)
    return y.astype(qkv.dtype), mx.concatenate([conv_state, qkv], axis=0)[1:], new_state


def delta_net_step_kernel(
    projected: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, constants: mx.array, key_heads: int,
) -> Step:  # fmt: skip
    """Computes :func:`delta_net_step_reference` with the kernel; Dk must be a multiple of 4."""
    heads, dv, dk = state.shape
    y, new_conv, new_state = _KERNEL(
        [projected, constants, conv_weight, conv_state, state],
        template=[
            ("T", projected.dtype), ("HK", key_heads), ("HV", heads), ("DK", dk), ("DV", dv),
            ("TAPS", conv_weight.shape[0]), ("THREADS", THREADS),
        ],
        grid=(heads * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1, heads * dv), conv_state.shape, state.shape],
        output_dtypes=[projected.dtype, projected.dtype, mx.float32],
    )  # fmt: skip
    return y, new_conv, new_state
