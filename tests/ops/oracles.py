"""The ops in float64 NumPy, written as plainly as possible."""

from __future__ import annotations

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def causal_conv(x: np.ndarray, weight: np.ndarray, state: np.ndarray) -> np.ndarray:
    inputs = np.concatenate([state, x])
    y = np.stack([(inputs[t : t + len(weight)] * weight).sum(axis=0) for t in range(len(x))])
    return y * sigmoid(y)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    heads, tokens, _ = q.shape
    group, context = heads // len(k), k.shape[1]
    out = np.empty_like(q)
    for h in range(heads):
        for t in range(tokens):
            visible = context - tokens + t + 1
            p = softmax(k[h // group, :visible] @ q[h, t] * scale)
            out[h, t] = p @ v[h // group, :visible]
    return out


def gated_delta(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    tokens, heads, _ = v.shape
    group = heads // k.shape[1]
    state, out = state.copy(), np.empty_like(v)
    for t in range(tokens):
        for h in range(heads):
            key, query = k[t, h // group], q[t, h // group]
            s = state[h] * decay[t, h]
            s = s + beta[t, h] * np.outer(v[t, h] - s @ key, key)
            out[t, h], state[h] = s @ query, s
    return out, state


def swiglu_expert(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """w = scale · q + bias, with q packed from the least significant bits of a little-endian bit stream."""
    rows = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(words), -1, bits)
    q = (stream * (1 << np.arange(bits))).sum(axis=-1).astype(np.float64)
    return q * np.repeat(scales, group_size, axis=1) + np.repeat(biases, group_size, axis=1)
