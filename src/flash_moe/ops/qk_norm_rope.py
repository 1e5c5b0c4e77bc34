"""Computes queries, keys and gate of full attention from its projections: head norms, rotary embedding, split.

Kernel: ``qk_norm_rope.metal``; notes in docs/kernels.md.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from .kernel import SIMD, Kernel
from .norm_kernel import rms_norm_reference
from .scalars import floats, integers

_SIMDGROUPS = 4  # simdgroups of a threadgroup; each computes one head of one token

_KERNEL = Kernel(
    "qk_norm_rope", ["qg", "k", "q_weight", "k_weight", "eps", "frequencies", "place"], ["q_out", "k_out", "gate"]
)


def qk_norm_rope_reference(
    qg: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    *,
    start: int,
    frequencies: tuple[float, ...],
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns q = rope(norm(q)), k = rope(norm(k)) and the gate, in float32.

    With n frequencies, elements i < n and i + n of a head rotate together by the angle position · frequencies[i], as in
    ``mx.fast.rope(traditional=False)``. Other elements do not change. Angles are exact at any position.

    Args:
        qg: [T, Hq · 2 · D] output of q_proj: query and gate of each head.
        k: [T, Hkv · D] output of k_proj, in the dtype of qg.
        q_weight, k_weight: [D] weights of the head norms.
        start: position of the first token.
        frequencies: radians per position of each pair.
        eps: epsilon of the norms.

    Returns:
        q [Hq, T, D], k [Hkv, T, D] and gate [T, Hq · D] in the dtype of qg.
    """
    tokens, dim, dtype = qg.shape[0], q_weight.shape[0], qg.dtype
    q, gate = mx.split(qg.reshape(tokens, -1, 2, dim), 2, axis=2)
    pairs = len(frequencies)
    angles = np.outer(np.arange(start, start + tokens), _turns(frequencies)) % 1.0 * (2 * np.pi)
    cos, sin = (mx.array(f(angles).astype(np.float32)) for f in (np.cos, np.sin))  # [T, pairs]

    def turned(x: mx.array, weight: mx.array) -> mx.array:
        x = rms_norm_reference(x.astype(mx.float32), weight, eps).swapaxes(0, 1)
        a, b, rest = mx.split(x, [pairs, 2 * pairs], axis=-1)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(dtype)

    return turned(q.squeeze(2), q_weight), turned(k.reshape(tokens, -1, dim), k_weight), gate.reshape(tokens, -1)


def place(start: int, tokens: int) -> mx.array:
    """Returns the array that :func:`qk_norm_rope_kernel` reads at run time: first position and number of tokens."""
    return integers(start, tokens)


def qk_norm_rope_kernel(
    qg: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    *,
    place: mx.array,
    frequencies: tuple[float, ...],
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Computes :func:`qk_norm_rope_reference` with the kernel, for positions below 2^24, which float32 represents
    exactly.

    Args:
        place: result of :func:`place`. It is an array, so that one trace serves every position.
    """
    tokens, dim = qg.shape[0], q_weight.shape[0]
    heads, kv_heads = qg.shape[1] // (2 * dim), k.shape[1] // dim
    groups = -(-tokens * (heads + kv_heads) // _SIMDGROUPS)
    q, keys, gate = _KERNEL(
        [qg, k, q_weight, k_weight, floats(eps), _split_turns(frequencies), place],
        template=[
            ("T", qg.dtype), ("HQ", heads), ("HKV", kv_heads), ("D", dim), ("ROTARY", 2 * len(frequencies)),
            ("SIMDGROUPS", _SIMDGROUPS),
        ],
        grid=(groups * _SIMDGROUPS * SIMD, 1, 1),
        threadgroup=(_SIMDGROUPS * SIMD, 1, 1),
        output_shapes=[(heads, tokens, dim), (kv_heads, tokens, dim), (tokens, heads * dim)],
        output_dtypes=[qg.dtype] * 3,
    )  # fmt: skip
    return q, keys, gate


def _turns(frequencies: tuple[float, ...]) -> np.ndarray:
    """Returns the turns of each pair per position, [pairs] float64."""
    return np.array(frequencies) / (2 * np.pi)


@lru_cache(maxsize=8)
def _split_turns(frequencies: tuple[float, ...]) -> mx.array:
    """Returns [2, pairs] float32 with the sum :func:`_turns` over the first axis, accurate to 48 bits."""
    turns = _turns(frequencies)
    high = turns.astype(np.float32)
    return mx.array(np.stack([high, (turns - high).astype(np.float32)]))
