"""The gated delta rule for many tokens on a GPU, in chunks (see docs/how-it-works.md, "The chunked delta rule")."""

from __future__ import annotations

import mlx.core as mx

CHUNK = 64  # tokens of a triangular system; a power of two
_SMALLEST = 1.2e-38  # a small normal float32, which replaces decays of 0
_TOGETHER = 32  # chunks whose systems are solved together; this limits memory


def gated_delta_chunks(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Runs the recurrence, with the contract of :func:`.gated_delta.gated_delta`.

    Everything that does not depend on the state is computed for many chunks together. Then each chunk in turn needs
    only four products with the state. All arithmetic is float32, but CUDA rounds products to TF32 unless
    ``MLX_ENABLE_TF32=0`` is set.
    """
    outputs = []
    for start in range(0, q.shape[0], _TOGETHER * CHUNK):
        part = slice(start, start + _TOGETHER * CHUNK)
        y, state = _run(q[part], k[part], v[part], decay[part], beta[part], state)
        outputs.append(y)
    return mx.concatenate(outputs).astype(q.dtype), state


def _run(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Returns y [T, Hv, Dv] float32 and the new state."""
    tokens, key_heads, dk = k.shape
    heads, dv = v.shape[1:]
    group = heads // key_heads  # value heads per key head
    q, k = (_chunks(a, key_heads, 1, dk) for a in (q, k))  # [N, Hk, 1, C, Dk]
    v, beta = _chunks(v, key_heads, group, dv), _chunks(beta, key_heads, group, 1)
    log_decay = mx.log(mx.maximum(decay.astype(mx.float32), _SMALLEST))
    log_decay = _chunks(log_decay, key_heads, group, 1)

    between = _decay_between(log_decay)  # [N, Hk, G, C, C]
    since_start = mx.exp(mx.cumsum(log_decay, axis=-2))
    until_end = between[..., -1:, :].swapaxes(-1, -2)
    kt = k.swapaxes(-1, -2)
    inverse = _inverse(mx.tril(beta * between * (k @ kt), -1))
    own, of_state = inverse @ (beta * v), inverse @ (beta * since_start * k)  # a token writes own - of_state · Sᵀ
    within, faded_q, kept_k = between * (q @ kt), since_start * q, until_end * k
    remaining = since_start[..., -1:, :]

    s, outputs = state.reshape(key_heads, group, dv, dk), []
    for n in range(k.shape[0]):
        st = s.swapaxes(-1, -2)
        writes = own[n] - of_state[n] @ st
        outputs.append(faded_q[n] @ st + within[n] @ writes)
        s = remaining[n] * s + writes.swapaxes(-1, -2) @ kept_k[n]
    y = mx.stack(outputs).transpose(0, 3, 1, 2, 4).reshape(-1, heads, dv)  # from [N, Hk, G, C, Dv]
    return y[:tokens], s.reshape(state.shape)


def _chunks(a: mx.array, key_heads: int, group: int, width: int) -> mx.array:
    """Reshapes [T, ...] to float32 [N, Hk, G, C, width]. The last chunk is padded with zeros, which have no effect."""
    missing = -a.shape[0] % CHUNK
    a = a.astype(mx.float32).reshape(-1, key_heads, group, width)
    if missing:
        a = mx.concatenate([a, mx.zeros((missing, *a.shape[1:]))])
    return a.reshape(-1, CHUNK, key_heads, group, width).transpose(0, 2, 3, 1, 4)


def _decay_between(log_decay: mx.array) -> mx.array:
    """Returns [..., C, C] for [..., C, 1]: the product of the decays after token j up to token i, and 0 for j > i.

    The logarithm of each product is summed separately, because differences of cumulative sums would lose small terms.
    """
    ones = mx.ones((CHUNK, CHUNK))
    sums = mx.cumsum(log_decay * mx.tril(ones, -1), axis=-2)
    return mx.tril(mx.exp(sums))


def _inverse(lower: mx.array) -> mx.array:
    """Returns (I + L)⁻¹ for strictly lower triangular L [..., C, C], by blocks: [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0],
    [-D⁻¹BA⁻¹, D⁻¹]].

    This is as stable as forward substitution. The power series of L is not, because its terms grow before they vanish.
    """
    *batch, size, _ = lower.shape
    inverse, width = mx.ones((*batch, size, 1, 1)), 1  # inverses of the diagonal blocks of this width
    while width < size:
        count = size // (2 * width)
        blocks = lower.reshape(*batch, count, 2, width, count, 2, width)[..., :, 1, :, :, 0, :]
        b = mx.diagonal(blocks, axis1=-4, axis2=-2)  # [..., width, width, count]
        b = mx.moveaxis(b, -1, -3)
        a, d = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        upper = mx.concatenate([a, mx.zeros_like(a)], axis=-1)
        inverse, width = mx.concatenate([upper, mx.concatenate([-(d @ b @ a), d], axis=-1)], axis=-2), 2 * width
    return inverse.reshape(lower.shape)
