"""Full attention between its projections: norms, rotary embedding, cache, softmax and output gate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import carray, types

from .compiling import MATRIX, function, helper, kernel
from .functions import exp, f32, sigmoid
from .memory import record
from .rows import mix, pointer, tile
from .vectors import ROWS, TOKENS, VECTORS, WIDTH
from .workers import Workers, run

_QUERIES = 16  # queries of a ticket, which read each key together
_ATTENTION = record("heads kv_heads dim half q_norm k_norm factors proj_step out_step parts count")
_PART = record("tokens blocks proj out turns keys values capacity before")
"""The tokens of one sequence in a pass, in blocks of queries, and the cache of the sequence."""


def supports(dim: int) -> bool:
    """Returns whether the kernels support heads of this width."""
    return dim % WIDTH == 0


@helper
def _head(source, weight, eps, turns, half, dim, target):  # type: ignore[no-untyped-def]
    """Applies the norm and the rotary embedding to one head; addresses of [D] float32."""
    x, out = carray(pointer(source), dim, np.float32), carray(pointer(target), dim, np.float32)
    w, turn = carray(pointer(weight), dim, np.float32), carray(pointer(turns), (2, half), np.float32)
    total = f32(0)
    for i in range(dim):
        total += x[i] * x[i]
    factor = f32(1) / np.sqrt(total / f32(dim) + eps)
    for i in range(dim):
        out[i] = x[i] * factor * w[i]
    for i in range(half):
        a, b = out[i], out[i + half]
        out[i], out[i + half] = a * turn[0, i] - b * turn[1, i], b * turn[0, i] + a * turn[1, i]


@kernel(3)
def _heads(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Prepares the query, key and value heads of a token, and writes keys and values to the cache."""
    job = carray(pointer(arguments), 1, _ATTENTION)[0]
    parts, n = carray(pointer(job.parts), job.count, _PART), 0
    while ticket >= parts[n].tokens:
        ticket -= parts[n].tokens
        n += 1
    part = parts[n]
    dim, x = job.dim, part.proj + ticket * job.proj_step
    eps, turns = carray(pointer(job.factors), 2, np.float32)[0], part.turns + ticket * 8 * job.half
    for h in range(job.heads):
        q = x + 8 * h * dim
        _head(q, job.q_norm, eps, turns, job.half, dim, q)
    k, v = x + 8 * job.heads * dim, x + 4 * dim * (2 * job.heads + job.kv_heads)
    for h in range(job.kv_heads):
        place = 4 * dim * (h * part.capacity + part.before + ticket)
        _head(k + 4 * h * dim, job.k_norm, eps, turns, job.half, dim, part.keys + place)
        source = carray(pointer(v + 4 * h * dim), dim, np.float32)
        target = carray(pointer(part.values + place), dim, np.float32)
        for i in range(dim):
            target[i] = source[i]


@kernel(3)
def _attend(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Computes the attention of one head for a block of queries of a part."""
    job = carray(pointer(arguments), 1, _ATTENTION)[0]
    parts, n = carray(pointer(job.parts), job.count, _PART), 0
    while ticket >= job.heads * parts[n].blocks:
        ticket -= job.heads * parts[n].blocks
        n += 1
    part = parts[n]
    dim, h, first = job.dim, ticket % job.heads, ticket // job.heads * _QUERIES
    queries = min(_QUERIES, part.tokens - first)
    seen = part.before + first + queries  # keys visible to the last query
    place = 4 * dim * part.capacity * (h * job.kv_heads // job.heads)
    keys, values = part.keys + place, part.values + place
    small, xs = carray(pointer(scratch), (TOKENS, ROWS), np.float32), carray(pointer(scratch + 256), _QUERIES, np.int64)
    scores = carray(pointer(scratch + 512), (queries, seen), np.float32)
    for i in range(queries):
        xs[i] = part.proj + (first + i) * job.proj_step + 8 * h * dim
    whole = seen // ROWS * ROWS
    for s in range(0, whole, ROWS):
        i = 0
        while i < queries:
            count = TOKENS if i + TOKENS <= queries else 1
            if count == TOKENS:
                tile(ROWS, TOKENS, keys + 4 * dim * s, 4 * dim, scratch + 256 + 8 * i, dim, scratch)
            else:
                tile(ROWS, 1, keys + 4 * dim * s, 4 * dim, scratch + 256 + 8 * i, dim, scratch)
            for j in range(count):
                for r in range(ROWS):
                    scores[i + j, s + r] = small[j, r]
            i += count
    for s in range(whole, seen):
        for i in range(queries):
            tile(1, 1, keys + 4 * dim * s, 4 * dim, scratch + 256 + 8 * i, dim, scratch)
            scores[i, s] = small[0, 0]
    scale = carray(pointer(job.factors), 2, np.float32)[1]
    for i in range(queries):
        row, own = scores[i], seen - queries + i + 1
        largest, total = row[0], f32(0)
        for s in range(own):
            largest = max(largest, row[s])
        for s in range(own):
            row[s] = exp((row[s] - largest) * scale)
            total += row[s]
        for s in range(own):
            row[s] /= total
        for s in range(own, seen):
            row[s] = f32(0)
    i = 0
    while i < queries:
        count = TOKENS if i + TOKENS <= queries else 1
        p, out = scratch + 512 + 4 * i * seen, part.out + (first + i) * job.out_step + 4 * h * dim
        d = 0
        while d < dim:
            wide = d + VECTORS * WIDTH <= dim
            if count == TOKENS and wide:
                mix(TOKENS, VECTORS, p, 4 * seen, values + 4 * d, 4 * dim, seen, out + 4 * d, job.out_step)
            elif wide:
                mix(1, VECTORS, p, 4 * seen, values + 4 * d, 4 * dim, seen, out + 4 * d, job.out_step)
            else:
                for j in range(count):
                    mix(
                        1,
                        1,
                        p + 4 * j * seen,
                        4 * seen,
                        values + 4 * d,
                        4 * dim,
                        seen,
                        out + j * job.out_step + 4 * d,
                        0,
                    )
            d += VECTORS * WIDTH if wide else WIDTH
        for j in range(count):
            y = carray(pointer(out + j * job.out_step), dim, np.float32)
            gate = carray(pointer(xs[i + j] + 4 * dim), dim, np.float32)
            for n in range(dim):
                y[n] *= sigmoid(gate[n])
        i += count


_HEADS_JOB, _ATTEND_JOB = _heads.address, _attend.address


@function(*(types.int64,) * 5, MATRIX, MATRIX, types.int64, types.int64, types.int64)
def _run(block, arguments, heads, attend, parts, proj, out, count, tokens, blocks):  # type: ignore[no-untyped-def]
    job = carray(pointer(arguments), 1, _ATTENTION)[0]
    job.proj_step, job.out_step = proj.strides[0], out.strides[0]
    job.parts, job.count = parts, count
    run(block, heads, arguments, tokens)
    run(block, attend, arguments, job.heads * blocks)


class Attention:
    """The attention of one layer, with its constants.

    Args:
        q_norm, k_norm: [D] float32.
        heads, kv_heads: Hq and Hkv.
        rotary: number of rotated dimensions of a head.
    """

    def __init__(
        self,
        q_norm: np.ndarray,
        k_norm: np.ndarray,
        *,
        heads: int,
        kv_heads: int,
        rotary: int,
        eps: float,
        workers: Workers,
    ) -> None:
        self._workers, dim = workers, len(q_norm)
        self._keep = [q_norm, k_norm, np.array([eps, dim**-0.5], np.float32)]
        q, k, factors = (a.ctypes.data for a in self._keep)
        self._record = np.zeros(1, _ATTENTION)
        self._record[0] = (heads, kv_heads, dim, rotary // 2, q, k, factors, 0, 0, 0, 0)
        self._address = self._record.ctypes.data

    def __call__(
        self,
        proj: np.ndarray,
        turns: np.ndarray,
        out: np.ndarray,
        parts: Sequence[tuple[int, int, np.ndarray, np.ndarray, int]],
    ) -> None:
        """Runs tokens of several sequences.

        Args:
            proj: [T, 2·Hq·D + 2·Hkv·D] float32: query and gate per head, then keys, then values. It is overwritten.
            turns: [T, 2, rotary / 2] float32, cosines and sines of the tokens' angles.
            out: [T, Hq·D] float32, the output.
            parts: for each sequence, the range of its rows (start, stop); the keys and values [Hkv, capacity, D]
                float32 of its cache; and the number of tokens in the cache, after which the new ones are written.
        """
        places = [(array.ctypes.data, array.strides[0]) for array in (proj, out, turns)]
        rows, blocks, seen = np.empty(len(parts), _PART), 0, 0
        for i, (first, end, keys, values, before) in enumerate(parts):
            count = end - first
            own = -(-count // _QUERIES)
            at = (place + first * step for place, step in places)
            rows[i] = (count, own, *at, keys.ctypes.data, values.ctypes.data, keys.shape[1], before)
            blocks, seen = blocks + own, max(seen, min(_QUERIES, count) * (before + count))
        self._workers.call(
            _run, self._address, _HEADS_JOB, _ATTEND_JOB, rows.ctypes.data, proj, out, len(parts), len(proj), blocks,
            scratch=512 + 4 * seen,
        )  # fmt: skip
