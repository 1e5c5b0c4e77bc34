"""The trials of all kernels: random operands with the sizes of a case, the reference, and MLX's ops.

The arguments of each function are the elements after the op in a :data:`~flash_moe.ops.dispatch.Case`, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import Quantization
from ..ops import decode_attention, delta_net_step, norm_kernel, qk_norm_rope, router, router_kernel
from ..ops.attention import attention as mlx_attention
from ..ops.delta_chunks import gated_delta_chunks
from ..ops.delta_net import delta_net
from ..ops.dispatch import Case
from ..ops.gated_delta import gated_delta, gated_delta_reference
from ..ops.linear import linear
from ..ops.norm import rms_norm
from ..ops.quantized_matvec import quantized_matvec
from ..rope import frequencies
from .expert_trial import experts
from .operands import codes, dtype_of, product, random, scales_of
from .trial import Trial

_ROWS = 8192  # rows of a matrix that are dequantised together
_CONTEXT = 1000  # keys in the cache of a trial of attention; the capacity is a little larger
_TOKENS = 150  # tokens of a prompt: two chunks and a part of one
_EPS, _THETA = 1e-6, 1e7
# Numbers from 1 to 16 and from -16 to -1 that all dtypes tell apart: of two alike, either could be chosen.
_DISTINCT = np.concatenate(
    [sign * (np.arange(0x3F80, 0x4180, dtype=np.uint32) << 16).view(np.float32) for sign in (1, -1)]
)


def trial_of(case: Case) -> Trial:
    """Returns the trial of a case.

    Raises:
        KeyError: the op is unknown.
    """
    op, *sizes = case
    return TRIALS[str(op)](*sizes)


def _quantized_matvec(
    tokens: int, columns: int, rows: int, bits: int, group: int, x_dtype: str, scales_dtype: str
) -> Trial:
    q, dtype = Quantization(bits, group), dtype_of(x_dtype)

    def operands() -> tuple[mx.array, ...]:
        return (
            random(tokens, columns, dtype=dtype), codes(rows, columns, bits),
            *scales_of(rows, columns, q, dtype_of(scales_dtype)),
        )  # fmt: skip

    def reference(x: mx.array, w: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        blocks = []
        for first in range(0, rows, _ROWS):
            codes, s, b = w[first : first + _ROWS], scales[first : first + _ROWS], biases[first : first + _ROWS]
            wide = mx.dequantize(codes, s.astype(mx.float32), b.astype(mx.float32), group_size=group, bits=bits)
            blocks.append(product(x, wide))
            mx.eval(blocks[-1])
        return [mx.concatenate(blocks, axis=1)]

    return Trial(
        lambda x, w, s, b: [quantized_matvec(x, w, s, b, q)], reference, lambda x, w, s, b: [linear(x, w, s, b, q)],
        operands, dtype,
    )  # fmt: skip


def _router(count: int, k: int, normalize: int, shared: int, dtype_name: str) -> Trial:
    dtype = dtype_of(dtype_name)

    def operands() -> tuple[mx.array, ...]:
        rng = np.random.default_rng()
        logits = np.stack([rng.permutation(_DISTINCT)[:count] for _ in range(3)])
        return mx.array(logits).astype(dtype), random(3, 1, dtype=dtype)

    def of(function: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., list[mx.array]]:
        def checked(logits: mx.array, gate: mx.array) -> list[mx.array]:
            found: list[mx.array] = []
            for rows in (slice(0, 1), slice(0, 3)):
                ids, weights = function(logits[rows], k, bool(normalize), gate[rows] if shared else None)
                chosen = (ids[..., None] == mx.arange(count)).astype(mx.float32)  # [T, K, E]
                found += [(chosen * weights[:, :k, None]).sum(axis=1), chosen.sum(axis=1), weights[:, k:].sum(axis=1)]
            return found

        return checked

    def timed(function: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., tuple[mx.array, mx.array]]:
        return lambda logits, gate: function(logits[:1], k, bool(normalize), gate[:1] if shared else None)

    return Trial(
        of(router_kernel.route), of(router.route), timed(router.route), operands, mx.float32,
        timed=timed(router_kernel.route),
    )  # fmt: skip


def _attention(heads: int, kv_heads: int, dim: int, rotary: int, dtype_name: str) -> Trial:
    dtype, scale = dtype_of(dtype_name), dim**-0.5
    options: dict[str, Any] = {"frequencies": frequencies(rotary, _THETA), "eps": _EPS}

    def operands() -> tuple[mx.array, ...]:
        cache = [random(1, kv_heads, _CONTEXT + 24, dim, dtype=dtype) for _ in "kv"]
        return (
            random(1, 2 * heads * dim, dtype=dtype), random(1, kv_heads * dim, dtype=dtype),
            random(dim, dtype=dtype), random(dim, dtype=dtype), *cache,
        )  # fmt: skip

    def kernel(
        qg: mx.array, k: mx.array, wq: mx.array, wk: mx.array, keys: mx.array, values: mx.array
    ) -> list[mx.array]:
        place, sizes = qk_norm_rope.place(_CONTEXT - 1, 1), decode_attention.cache_sizes(_CONTEXT, keys)
        q, key, gate = qk_norm_rope.qk_norm_rope_kernel(qg, k, wq, wk, place=place, **options)
        return [q, key, gate, decode_attention.decode_attention_kernel(q, keys, values, sizes, gate, scale)]

    def reference(
        qg: mx.array, k: mx.array, wq: mx.array, wk: mx.array, keys: mx.array, values: mx.array
    ) -> list[mx.array]:
        q, key, gate = qk_norm_rope.qk_norm_rope_reference(qg, k, wq, wk, start=_CONTEXT - 1, **options)
        return [q, key, gate, decode_attention.decode_attention_reference(q, keys, values, _CONTEXT, gate, scale)]

    def usual(
        qg: mx.array, k: mx.array, wq: mx.array, wk: mx.array, keys: mx.array, values: mx.array
    ) -> list[mx.array]:
        q, gate = qg.reshape(1, 1, heads, 2 * dim).split(2, axis=-1)
        normed = [rms_norm(q, wq, _EPS), rms_norm(k.reshape(1, 1, kv_heads, dim), wk, _EPS)]
        qk = mx.fast.rope(
            mx.concatenate(normed, axis=2).swapaxes(1, 2), rotary, traditional=False, base=_THETA, scale=1.0,
            offset=_CONTEXT - 1,
        )  # fmt: skip
        y = mlx_attention(qk[0, :heads], keys[0, :, :_CONTEXT], values[0, :, :_CONTEXT], scale)
        return [qk, (y.swapaxes(0, 1) * mx.sigmoid(gate[0])).reshape(1, heads * dim)]

    return Trial(kernel, reference, usual, operands, dtype)


def _delta_net(key_heads: int, heads: int, dk: int, dv: int, taps: int, dtype_name: str) -> Trial:
    dtype, values = dtype_of(dtype_name), heads * dv
    channels = 2 * key_heads * dk + values

    def operands() -> tuple[mx.array, ...]:
        constants = delta_net_step.pack_constants(
            -mx.exp(random(heads)), random(heads), random(dv), l2_eps=_EPS, eps=_EPS
        )
        return (
            random(1, channels + values + 2 * heads, dtype=dtype), random(taps - 1, channels, dtype=dtype),
            random(heads, dv, dk), random(taps, channels, dtype=dtype, scale=0.5), constants,
        )  # fmt: skip

    def of(step: Callable[..., Sequence[mx.array]]) -> Callable[..., Sequence[mx.array]]:
        return lambda projected, conv, state, weight, constants: step(
            projected, conv, state, conv_weight=weight, constants=constants, key_heads=key_heads
        )

    def usual(
        projected: mx.array, conv: mx.array, state: mx.array, weight: mx.array, constants: mx.array
    ) -> Sequence[mx.array]:
        qkv, z, b, a = mx.split(projected, [channels, channels + values, channels + values + heads], axis=-1)
        log_decay, dt_bias, norm_weight, _ = mx.split(constants, [heads, 2 * heads, 2 * heads + dv])
        return delta_net(
            qkv, z, b, a, conv, state, conv_weight=weight, qk_scale=mx.ones((2, 1, 1), dtype=dtype), l2_eps=_EPS, eps=_EPS,
            log_decay=log_decay, dt_bias=dt_bias, norm_weight=norm_weight.astype(dtype),
        )  # fmt: skip

    return Trial(
        of(delta_net_step.delta_net_step_kernel), of(delta_net_step.delta_net_step_reference), usual, operands, dtype
    )


def _add_rms_norm(width: int, dtype_name: str) -> Trial:
    dtype = dtype_of(dtype_name)

    def usual(x: mx.array, residual: mx.array, weight: mx.array) -> list[mx.array]:
        total = x + residual
        return [mx.fast.rms_norm(total, weight, _EPS), total]

    def operands() -> tuple[mx.array, ...]:
        return random(1, width, dtype=dtype), random(1, width, dtype=dtype), random(width, dtype=dtype)

    return Trial(
        lambda x, residual, w: norm_kernel.add_rms_norm_kernel(x, residual, w, _EPS),
        lambda x, residual, w: norm_kernel.add_rms_norm_reference(x, residual, w, _EPS),
        usual, operands, dtype,
    )  # fmt: skip


def _delta_chunks(key_heads: int, heads: int, dk: int, dv: int, dtype_name: str) -> Trial:
    dtype = dtype_of(dtype_name)

    def operands() -> tuple[mx.array, ...]:
        q, k = (random(_TOKENS, key_heads, dk, dtype=dtype, scale=dk**-0.5) for _ in "qk")
        decay, beta = (mx.random.uniform(low, 1.0, (_TOKENS, heads)) for low in (0.8, 0.0))
        return q, k, random(_TOKENS, heads, dv, dtype=dtype), decay, beta.astype(dtype), random(heads, dv, dk)

    return Trial(gated_delta_chunks, gated_delta_reference, gated_delta, operands, dtype, traced=False)


TRIALS: dict[str, Callable[..., Trial]] = {
    "quantized_matvec": _quantized_matvec,
    "experts": experts,
    "router": _router,
    "attention": _attention,
    "delta_net": _delta_net,
    "add_rms_norm": _add_rms_norm,
    "delta_chunks": _delta_chunks,
}
