"""What the kernels of the mixers and norms compute, in float64 NumPy, and how near to it they have to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import oracles

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
HALF_ULP = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-24}  # relative
SMALLEST = {mx.bfloat16: 2.0**-134, mx.float16: 2.0**-25, mx.float32: 2.0**-150}  # half the smallest positive number
FLOAT_ERROR = 2.0**-24


def float64(array: mx.array) -> np.ndarray:
    """The exact values of an array of any float type."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def random(rng: np.random.RandomState, shape: Sequence[int], dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    """Normally distributed numbers."""
    return mx.array((scale * rng.randn(*shape)).astype(np.float32)).astype(dtype)


def error(found: mx.array, expected: np.ndarray, magnitude: np.ndarray | float) -> float:
    """The largest error in units of what is allowed: half an ulp of the output and ``magnitude`` float32 roundings."""
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    allowed = HALF_ULP[found.dtype] * np.abs(expected) + SMALLEST[found.dtype] + FLOAT_ERROR * magnitude
    worst = np.max(np.abs(float64(found) - expected) / allowed)
    return math.inf if np.isnan(worst) else float(worst)


def rope(x: np.ndarray, start: int, frequencies: tuple[float, ...]) -> np.ndarray:
    """x [heads, T, D] turned from position ``start`` on; of n frequencies, element i pairs with i + n."""
    positions = np.arange(start, start + x.shape[1])
    angles, pairs = np.outer(positions, frequencies), len(frequencies)
    a, b, rest = np.split(x, [pairs, 2 * pairs], axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1)


def qk_norm_rope(
    qg: np.ndarray, k: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, *, start: int,
    frequencies: tuple[float, ...], eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    tokens, dim = len(qg), len(q_weight)
    q, gate = np.moveaxis(qg.reshape(tokens, -1, 2, dim), 2, 0)
    q, k = oracles.rms_norm(q, q_weight, eps), oracles.rms_norm(k.reshape(tokens, -1, dim), k_weight, eps)
    q, k = (rope(a.swapaxes(0, 1), start, frequencies) for a in (q, k))
    return q, k, gate.reshape(tokens, -1)


def decode_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int, gate: np.ndarray, scale: float
) -> np.ndarray:
    y = oracles.attention(q, keys[:, :length], values[:, :length], scale)
    return y.reshape(gate.shape) * oracles.sigmoid(gate)


def delta_net_step(
    qkv: np.ndarray, z: np.ndarray, b: np.ndarray, a: np.ndarray, conv_state: np.ndarray, state: np.ndarray, *,
    conv_weight: np.ndarray, log_decay: np.ndarray, dt_bias: np.ndarray, norm_weight: np.ndarray, key_heads: int,
    l2_eps: float, eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    heads, dv, dk = state.shape
    mixed = oracles.causal_conv(qkv, conv_weight, conv_state)
    q, k, v = np.split(mixed, [key_heads * dk, 2 * key_heads * dk], axis=-1)
    q, k = (x.reshape(1, key_heads, dk) for x in (q, k))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + l2_eps) for x in (q, k))
    decay = np.exp(np.logaddexp(a + dt_bias, 0) * log_decay)
    y, new_state = oracles.gated_delta(q / dk**0.5, k, v.reshape(1, heads, dv), decay, oracles.sigmoid(b), state)
    y = oracles.rms_norm(y, norm_weight, eps).reshape(z.shape) * z * oracles.sigmoid(z)
    return y, np.concatenate([conv_state, qkv])[1:], new_state
