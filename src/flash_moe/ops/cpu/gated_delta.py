"""Gated DeltaNet between its projections: convolution, delta rule, norm and gate. States are updated in place.

It runs the rule of :mod:`flash_moe.ops.gated_delta` token by token, so that the state of a head stays in the core's
cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray, types

from .atomic import call10
from .compiling import MATRIX, function, kernel
from .functions import f32, sigmoid
from .memory import record
from .rows import pointer
from .workers import Workers, run

_DELTA = record(
    "convolve key_heads heads dk dv taps conv_weight log_decay dt_bias norm epsilons proj_step out_step parts count"
)
_PART = record("tokens proj out conv state")
"""The tokens of one sequence in a pass, and the states of the sequence."""


@kernel(10)
def _convolve(x, step, first, count, tokens, taps, weight, state, channels, kept):  # type: ignore[no-untyped-def]
    """Computes SiLU of the causal convolution of some channels in place, from the last token to the first, and updates
    the state.

    Args:
        x: address of [T, ...], with ``step`` bytes per row. weight: address of [taps, C]. state: address of [taps - 1,
            C].
        kept: address of memory for [taps - 1, count].
    """
    old = taps - 1
    new = carray(pointer(kept), (old, count), np.float32)
    states = carray(pointer(state), (old, channels), np.float32)
    weights = carray(pointer(weight), (taps, channels), np.float32)
    for i in range(old):
        t = tokens - old + i
        source = carray(pointer(state + 4 * (old + t) * channels if t < 0 else x + t * step), first + count, np.float32)
        for c in range(count):
            new[i, c] = source[first + c]
    for t in range(tokens - 1, -1, -1):
        row = carray(pointer(x + t * step + 4 * first), count, np.float32)
        for c in range(count):
            row[c] *= weights[old, first + c]
        for i in range(old):
            if t - old + i < 0:
                for c in range(count):
                    row[c] += states[t + i, first + c] * weights[i, first + c]
            else:
                before = carray(pointer(x + (t - old + i) * step + 4 * first), count, np.float32)
                for c in range(count):
                    row[c] += before[c] * weights[i, first + c]
        for c in range(count):
            row[c] *= sigmoid(row[c])
    for i in range(old):
        for c in range(count):
            states[i, first + c] = new[i, c]


@kernel(3)
def _head(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Computes a key head with its value heads for all tokens of a part."""
    job = carray(pointer(arguments), 1, _DELTA)[0]
    own = carray(pointer(job.parts), job.count, _PART)[ticket // job.key_heads]
    ticket %= job.key_heads
    dk, dv, group = job.dk, job.dv, job.heads // job.key_heads
    key_dim, value_dim = job.key_heads * dk, job.heads * dv
    channels, values = 2 * key_dim + value_dim, 2 * key_dim + ticket * group * dv
    for part in range(3):
        first, count = (part * key_dim + ticket * dk, dk) if part < 2 else (values, group * dv)
        call10(
            job.convolve, own.proj, job.proj_step, first, count, own.tokens, job.taps, job.conv_weight, own.conv, channels,
            scratch,
        )  # fmt: skip
    log_decay = carray(pointer(job.log_decay), job.heads, np.float32)
    dt_bias = carray(pointer(job.dt_bias), job.heads, np.float32)
    norm, epsilons = carray(pointer(job.norm), dv, np.float32), carray(pointer(job.epsilons), 2, np.float32)
    states = carray(pointer(own.state), (job.heads, dv, dk), np.float32)
    for t in range(own.tokens):
        x = carray(pointer(own.proj + t * job.proj_step), channels + value_dim + 2 * job.heads, np.float32)
        out = carray(pointer(own.out + t * job.out_step), value_dim, np.float32)
        q, k = x[ticket * dk : (ticket + 1) * dk], x[key_dim + ticket * dk : key_dim + (ticket + 1) * dk]
        qq, kk = f32(0), f32(0)
        for i in range(dk):
            qq += q[i] * q[i]
            kk += k[i] * k[i]
        q_factor = f32(1) / np.sqrt((qq + epsilons[0]) * f32(dk))
        k_factor = f32(1) / np.sqrt(kk + epsilons[0])
        for i in range(dk):
            q[i] *= q_factor
            k[i] *= k_factor
        for h in range(ticket * group, (ticket + 1) * group):
            v, z = x[2 * key_dim + h * dv :], x[channels + h * dv :]
            b, a = x[channels + value_dim + h], x[channels + value_dim + job.heads + h]
            dt = a + dt_bias[h]
            dt = dt if dt != dt else max(dt, f32(0)) + np.log1p(np.exp(-abs(dt)))  # softplus; NaN propagates
            decay, beta = np.exp(dt * log_decay[h]), sigmoid(b)
            y, squares = out[h * dv :], f32(0)
            for i in range(dv):
                s = states[h, i]
                found = f32(0)
                for j in range(dk):
                    found += s[j] * k[j]
                write, total = (v[i] - found * decay) * beta, f32(0)
                for j in range(dk):
                    value = s[j] * decay + write * k[j]
                    s[j] = value
                    total += value * q[j]
                y[i] = total
                squares += total * total
            factor = f32(1) / np.sqrt(squares / f32(dv) + epsilons[1])
            for i in range(dv):
                y[i] *= factor * norm[i] * z[i] * sigmoid(z[i])


_CONVOLVE, _HEAD_JOB = _convolve.address, _head.address


@function(*(types.int64,) * 4, MATRIX, MATRIX, types.int64)
def _step(block, arguments, head, parts, proj, out, count):  # type: ignore[no-untyped-def]
    job = carray(pointer(arguments), 1, _DELTA)[0]
    job.proj_step, job.out_step = proj.strides[0], out.strides[0]
    job.parts, job.count = parts, count
    run(block, head, arguments, job.key_heads * count)


class GatedDelta:
    """The Gated DeltaNet of one layer, with its constants.

    Args:
        conv_weight: [taps, C]; log_decay, dt_bias: [Hv]; norm: [Dv]; all float32.
        key_heads, key_dim: Hk and Dk.
        l2_eps: added to the sums of squares of q and k. eps: epsilon of the norm.
    """

    def __init__(
        self,
        conv_weight: np.ndarray,
        log_decay: np.ndarray,
        dt_bias: np.ndarray,
        norm: np.ndarray,
        *,
        key_heads: int,
        key_dim: int,
        l2_eps: float,
        eps: float,
        workers: Workers,
    ) -> None:
        self._workers = workers
        epsilons = np.array([l2_eps, eps], np.float32)
        self._keep = [np.ascontiguousarray(a) for a in (conv_weight, log_decay, dt_bias, norm, epsilons)]
        taps, heads, dv = len(conv_weight), len(log_decay), len(norm)
        conv_at, *others = (a.ctypes.data for a in self._keep)
        self._record = np.zeros(1, _DELTA)
        self._record[0] = (_CONVOLVE, key_heads, heads, key_dim, dv, taps, conv_at, *others, 0, 0, 0, 0)
        self._address = self._record.ctypes.data
        self._scratch = 4 * (taps - 1) * max(key_dim, heads // key_heads * dv)

    def __call__(
        self, proj: np.ndarray, out: np.ndarray, parts: Sequence[tuple[int, int, np.ndarray, np.ndarray]]
    ) -> None:
        """Runs tokens of several sequences.

        Args:
            proj: [T, 2·Hk·Dk + 2·Hv·Dv + 2·Hv] float32: q, k, v, z, b and a. It is overwritten.
            out: [T, Hv·Dv] float32, the output.
            parts: for each sequence, the range of its rows (start, stop), its conv [taps - 1, C] and its state [Hv, Dv,
                Dk], float32, which are updated in place.
        """
        x, y = proj.ctypes.data, out.ctypes.data
        rows = np.empty(len(parts), _PART)
        for i, (first, end, conv, state) in enumerate(parts):
            at = x + first * proj.strides[0], y + first * out.strides[0]
            rows[i] = (end - first, *at, conv.ctypes.data, state.ctypes.data)
        self._workers.call(
            _step, self._address, _HEAD_JOB, rows.ctypes.data, proj, out, len(parts), scratch=self._scratch
        )
