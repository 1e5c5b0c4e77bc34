"""Depthwise causal convolution over time, with a state of the last inputs."""

from __future__ import annotations

import mlx.core as mx

from .blas import on_cpu


def causal_conv(x: mx.array, weight: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Returns y[t, c] = SiLU(Σ_i weight[i, c] · x[t - taps + 1 + i, c]).

    Args:
        x: [T, C] inputs.
        weight: [taps, C].
        state: [taps - 1, C], the inputs before x (zeros at the start of a sequence).

    Returns:
        y [T, C], and the state [taps - 1, C] after the last input.
    """
    tokens, taps = x.shape[0], weight.shape[0]
    inputs = mx.concatenate([state, x], axis=0)
    if tokens == 1 and on_cpu(x.dtype):
        y = (inputs * weight).sum(axis=0, keepdims=True)
        return y * mx.sigmoid(y), inputs[1:]
    if tokens == 1:  # rows are views, so that a trace fuses all of this into one launch
        rows = [inputs[i : i + 1].astype(mx.float32) * weight[i : i + 1].astype(mx.float32) for i in range(taps)]
        y = sum(rows[1:], rows[0])
        return (y * mx.sigmoid(y)).astype(x.dtype), inputs[1:]
    y = inputs[:tokens] * weight[0]
    for i in range(1, taps):
        y = y + inputs[i : i + tokens] * weight[i]
    return y * mx.sigmoid(y), mx.contiguous(inputs[tokens:])
