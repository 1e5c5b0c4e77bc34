"""The gated delta rule: a linear-attention recurrence with decay and error-correcting writes.

For every value head, with state S [Dv, Dk]:  S ← g·S;  S ← S + β·(v − S·k)⊗k;  y = S·q.
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from . import kernel
from .blas import on_cpu, to_numpy, use_blas
from .delta_chunks import gated_delta_chunks
from .dispatch import use_kernel

CHUNK = 64  # tokens that are solved together on the CPU
_CHUNKS_FROM = 16  # minimum tokens for chunks; fewer are faster one after the other
_STEP_STATE = 1 << 18  # minimum elements of a state for which one token on the CPU also uses NumPy


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Runs the recurrence over T tokens.

    Args:
        q, k: [T, Hk, Dk], normalised and scaled. Value heads share key heads in groups of Hv / Hk.
        v: [T, Hv, Dv].
        decay: [T, Hv] float32, the factor g in (0, 1].
        beta: [T, Hv], the writing strength in (0, 1).
        state: [Hv, Dv, Dk] float32.

    Returns:
        y [T, Hv, Dv] in the dtype of q, and the state after the last token.
    """
    if use_blas(q.shape[0], q.dtype):
        return _blas_chunked(q, k, v, decay, beta, state)
    if q.shape[0] == 1 and state.size >= _STEP_STATE and on_cpu(q.dtype):
        return _blas_step(q, k, v, decay, beta, state)
    (tokens, key_heads, dk), (heads, dv, _) = k.shape, state.shape
    if tokens >= _CHUNKS_FROM and use_kernel("delta_chunks", key_heads, heads, dk, dv, q.dtype):
        return gated_delta_chunks(q, k, v, decay, beta, state)
    y, new_state = mx.fast.gated_delta_update(q[None], k[None], v[None], decay[None], beta[None], state[None])
    return y.squeeze(0), new_state.squeeze(0)  # an index would copy


def steps(tokens: int) -> bool:
    """Returns whether tokens run through :func:`gated_delta_step`: a single token on CUDA, where MLX's op is about
    twenty launches.
    """
    return tokens == 1 and kernel.back_end() == "cuda"


def gated_delta_step(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Runs one token, in three launches if it is traced: a product with the state, the new state, and a product with
    it.

    Args:
        q, k: [1, Hk, Dk] float32.
        v: [1, Hv, Dv].
        decay, beta: [Hk, Hv / Hk, 1, 1].
        state: [Hv, Dv, Dk] float32.

    Returns:
        y [1, Hv, Dv] float32, and the state after the token.
    """
    (_, key_heads, dk), (heads, dv, _) = k.shape, state.shape
    group = heads // key_heads  # value heads per key head
    query, key = (a.reshape(key_heads, dk, 1) for a in (q, k))
    old, value = state.reshape(key_heads, group * dv, dk), v.reshape(key_heads, group, dv, 1)
    read = (old @ key).reshape(key_heads, group, dv, 1)
    write = (value - decay * read) * beta
    new = decay * state.reshape(key_heads, group, dv, dk) + write * key.reshape(key_heads, 1, 1, dk)
    y = new.reshape(key_heads, group * dv, dk) @ query
    return y.reshape(1, heads, dv), new.reshape(state.shape)


def gated_delta_reference(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Runs the recurrence as written above, token by token in float32, with the same contract."""
    dtype = q.dtype
    tokens, key_heads, dk = k.shape
    heads, dv = v.shape[1:]
    group = heads // key_heads  # value heads per key head
    qs, ks, vs, decays, betas = (
        a.astype(mx.float32).reshape(tokens, key_heads, *shape).split(tokens)
        for a, shape in (
            (q, (1, dk, 1)), (k, (1, dk, 1)), (v, (group, dv, 1)), (decay, (group, 1, 1)), (beta, (group, 1, 1)),
        )
    )  # fmt: skip
    s = state.reshape(1, key_heads, group, dv, dk)
    outputs = []
    for t in range(tokens):
        s = s * decays[t]
        s = s + (vs[t] - s @ ks[t]) * betas[t] * ks[t].swapaxes(-1, -2)
        outputs.append((s @ qs[t]).reshape(1, heads, dv))
    return mx.concatenate(outputs).astype(dtype), s.reshape(state.shape)


def _blas_step(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Runs one token head by head in NumPy, so that the state of a head stays in the processor's cache."""
    new_state = mx.zeros(state.shape)
    mx.eval(q, k, v, decay, beta, state, new_state)
    qs, ks, vs, decays, betas = (np.array(array, copy=False)[0] for array in (q, k, v, decay, beta))
    old, new = np.array(state, copy=False), np.array(new_state, copy=False)
    group, write, y = len(vs) // len(ks), np.empty(state.shape[1:], np.float32), np.empty_like(vs)
    for head, s in enumerate(new):
        key = ks[head // group]
        np.multiply(old[head], decays[head], out=s)
        np.multiply(((vs[head] - s @ key) * betas[head])[:, None], key, out=write)
        s += write
        np.dot(s, qs[head // group], out=y[head])
    return mx.array(y[None]), new_state


def _blas_chunked(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Solves a chunk of tokens at a time as one triangular system (see docs/how-it-works.md, "The chunked delta rule")."""
    group = v.shape[1] // k.shape[1]
    qs, ks = (np.repeat(to_numpy(a).transpose(1, 0, 2), group, axis=0) for a in (q, k))  # [Hv, T, Dk]
    vs = to_numpy(v).transpose(1, 0, 2)
    log_decay = np.log(np.maximum(to_numpy(decay.T), np.finfo(np.float32).tiny), dtype=np.float64)
    betas = to_numpy(beta.T)
    current = to_numpy(state)
    out = np.empty_like(vs)
    for start in range(0, q.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        out[:, part], current = _chunk(
            qs[:, part], ks[:, part], vs[:, part], log_decay[:, part], betas[:, part], current
        )
    return mx.array(out.transpose(1, 0, 2)), mx.array(current)


def _chunk(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, log_decay: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes one chunk; arrays are [Hv, C, ·], and the state is [Hv, Dv, Dk]."""
    total = np.cumsum(log_decay, axis=1)  # log of the decay since the start; float64, for accurate differences
    between = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None, :], 0.0).astype(np.float32)))
    faded, kt = np.exp(total.astype(np.float32))[..., None], k.transpose(0, 2, 1)
    system = np.tril(beta[..., None] * between * (k @ kt), -1) + np.eye(k.shape[1], dtype=np.float32)
    target = beta[..., None] * (v - faded * (k @ state.transpose(0, 2, 1)))
    writes = np.linalg.solve(system, target)  # the vectors that tokens add to the state
    y = faded * (q @ state.transpose(0, 2, 1)) + (between * (q @ kt)) @ writes
    remaining = between[:, -1, :, None]
    new_state = faded[:, -1, :, None] * state + (remaining * writes).transpose(0, 2, 1) @ k
    return y, new_state
