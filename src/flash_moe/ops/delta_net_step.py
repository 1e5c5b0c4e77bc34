"""The Gated DeltaNet step of one token, from its input projections to the input of its output projection.

Kernel: ``delta_net_step.metal``; notes in docs/kernels.md.
"""

from __future__ import annotations

import mlx.core as mx

from .causal_conv import causal_conv
from .gated_delta import gated_delta_reference
from .kernel import Kernel
from .norm import l2_norm
from .norm_kernel import rms_norm_reference
from .scalars import floats

THREADS = 512  # per value head: a lane has 8 float4 of a 128 × 128 state

_KERNEL = Kernel(
    "delta_net_step",
    [
        "qkv", "z", "b", "a", "conv_weight", "conv_state", "log_decay", "dt_bias", "norm_weight", "eps", "state",
    ],
    ["y", "new_conv", "new_state"],
)  # fmt: skip

Step = tuple[mx.array, mx.array, mx.array]


def supports(key_dim: int) -> bool:
    """Whether :func:`delta_net_step_kernel` takes keys of this width."""
    return key_dim % 4 == 0


def delta_net_step_reference(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array,
    key_heads: int, l2_eps: float, eps: float,
) -> Step:  # fmt: skip
    """y = norm(S · q) · silu(z) after S ← g·S, S ← S + β·(v − S·k)⊗k, in float32.

    q, k, v = silu(conv(qkv)), with q / |q| / sqrt(Dk) and k / |k|; g = exp(log_decay · softplus(a + dt_bias)) and
    β = sigmoid(b). Value heads share key heads in groups of Hv / Hk. Within, nothing is rounded to the dtype of qkv.

    Args:
        qkv: [1, C] output of in_proj_qkv, C = 2 · Hk · Dk + Hv · Dv.
        z: [1, Hv · Dv] output of in_proj_z.
        b, a: [1, Hv] outputs of in_proj_b and in_proj_a.
        conv_state: [taps - 1, C] inputs of the last tokens, in the dtype of qkv.
        state: [Hv, Dv, Dk] float32.
        conv_weight: [taps, C], taps >= 2.
        log_decay: [Hv], -exp(A_log).
        dt_bias: [Hv].
        norm_weight: [Dv] of the gated norm.
        key_heads: Hk.
        l2_eps: added to Σq² and Σk².
        eps: of the gated norm.

    Returns:
        y [1, Hv · Dv] in the dtype of qkv, and the new conv_state and state.
    """
    heads, dv, dk = state.shape
    wide = [array.astype(mx.float32) for array in (qkv, conv_weight, conv_state)]
    mixed, _ = causal_conv(*wide)
    q, k, v = mx.split(mixed, [key_heads * dk, 2 * key_heads * dk], axis=-1)
    q, k = (l2_norm(array.reshape(1, key_heads, dk), l2_eps) for array in (q, k))
    dt = mx.logaddexp(a.astype(mx.float32) + dt_bias.astype(mx.float32), 0.0)  # softplus
    decay = mx.exp(dt * log_decay.astype(mx.float32))
    beta = mx.sigmoid(b.astype(mx.float32))
    y, new_state = gated_delta_reference(q * dk**-0.5, k, v.reshape(1, heads, dv), decay, beta, state)
    gate = z.astype(mx.float32)
    y = rms_norm_reference(y, norm_weight, eps).reshape(gate.shape) * gate * mx.sigmoid(gate)
    return y.astype(qkv.dtype), mx.concatenate([conv_state, qkv], axis=0)[1:], new_state


def delta_net_step_kernel(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, conv_state: mx.array, state: mx.array, *,
    conv_weight: mx.array, log_decay: mx.array, dt_bias: mx.array, norm_weight: mx.array,
    key_heads: int, l2_eps: float, eps: float,
) -> Step:  # fmt: skip
    """As :func:`delta_net_step_reference`, by the kernel; Dk is a multiple of 4."""
    heads, dv, dk = state.shape
    y, new_conv, new_state = _KERNEL(
        [qkv, z, b, a, conv_weight, conv_state, log_decay, dt_bias, norm_weight, floats(l2_eps, eps), state],
        template=[
            ("T", qkv.dtype), ("HK", key_heads), ("HV", heads), ("DK", dk), ("DV", dv),
            ("TAPS", conv_weight.shape[0]), ("THREADS", THREADS),
        ],
        grid=(heads * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[z.shape, conv_state.shape, state.shape],
        output_dtypes=[qkv.dtype, qkv.dtype, mx.float32],
    )  # fmt: skip
    return y, new_conv, new_state
