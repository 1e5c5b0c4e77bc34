"""Multiplies matrices with the rows of x, in chunks of matrix rows for all threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import carray, types

from .arranged import ARRANGE_JOB, FORM, Arranged, fill
from .atomic import call8, call9
from .compiling import MATRIX as MATRIX_OF_FLOATS
from .compiling import function, kernel
from .formats import Format
from .memory import record
from .rows import dequantize, multiply, pointer, tile
from .vectors import ROWS, TOKENS
from .workers import Workers, run

CHUNK = 1 << 16  # weights of a ticket for one token: a few microseconds
PANEL = 24  # rows that a thread dequantises together for many tokens
BLOCK = 256  # tokens of a ticket, whose x stays in the cache
KEPT = 1 << 14  # floats of x up to which a job is kept for the next pass with the same number of tokens
_ONE_BY_ONE = 4  # tokens below which each token is multiplied separately

MATRIX = record("multiply dequantize w s b rows columns form at")
"""A matrix: its kernels, its bytes, the form of x that it needs, and the offset of its outputs in a row of y."""
MATRIX_BYTES = MATRIX.itemsize


@dataclass(frozen=True)
class Matrix:
    """A stored matrix, [rows, columns].

    Attributes:
        parts: addresses of weights, scales and biases (0 if there are none), or their offsets in a record.
    """

    format: Format
    rows: int
    columns: int
    parts: tuple[int, int, int]

    def describe(self, form: int = 0, at: int = 0) -> tuple[int, ...]:
        """Returns the matrix as a :data:`MATRIX`."""
        kernels = multiply(self.format).address, dequantize(self.format).address
        return *kernels, *self.parts, self.rows, self.columns, form, at


@kernel(9)
def _product(matrix, base, xs, ys, weights, count, first, last, scratch):  # type: ignore[no-untyped-def]
    """Multiplies the rows ``first`` to ``last`` of a matrix with rows of x.

    Args:
        matrix: address of a :data:`MATRIX`. base: base address of its parts.
        xs, ys: addresses of tables with the addresses of reordered rows of x, and of rows of y.
        weights: address of a factor per row. Products times this factor are added to y; with 0, products overwrite y.
        scratch: work memory of this thread, :func:`scratch_bytes` bytes.
    """
    m = carray(pointer(matrix), 1, MATRIX)[0]
    x, y = carray(pointer(xs), count, np.int64), carray(pointer(ys), count, np.int64)
    factor = carray(pointer(weights), count, np.float32)
    w, s, b, columns = base + m.w, base + m.s, base + m.b, m.columns
    width = (columns + 15) // 16 * 16
    if count < _ONE_BY_ONE:
        for i in range(count):
            target = y[i] + 4 * m.at
            to = target if weights == 0 else scratch - 4 * first
            call9(m.multiply, w, s, b, columns, x[i], x[i] + 4 * width, to, first, last)
            if weights != 0:
                out = carray(pointer(target + 4 * first), last - first, np.float32)
                found = carray(pointer(scratch), last - first, np.float32)
                for r in range(last - first):
                    out[r] += factor[i] * found[r]
        return
    sums, panel = carray(pointer(scratch), (TOKENS, ROWS), np.float32), scratch + 4 * 64
    for start in range(first, last, PANEL):
        stop = min(start + PANEL, last)
        call8(m.dequantize, w, s, b, columns, panel, 4 * width, start, stop)
        i = 0
        while i < count:
            tokens = TOKENS if i + TOKENS <= count else 1
            for r in range(start, stop, ROWS):
                rows = panel + 4 * width * (r - start)
                if tokens == TOKENS:
                    tile(ROWS, TOKENS, rows, 4 * width, xs + 8 * i, width, scratch)
                else:
                    tile(ROWS, 1, rows, 4 * width, xs + 8 * i, width, scratch)
                for t in range(tokens):
                    out = carray(pointer(y[i + t] + 4 * (m.at + r)), ROWS, np.float32)
                    for j in range(min(ROWS, stop - r)):
                        if weights == 0:
                            out[j] = sums[t, j]
                        else:
                            out[j] += factor[i + t] * sums[t, j]
            i += tokens


PRODUCT = _product.address


def scratch_bytes(columns: int) -> int:
    """Returns the scratch bytes of a product with ``columns`` weights per row.

    One token needs 4 more bytes per row of a ticket.
    """
    return 4 * 64 + 4 * (PANEL + ROWS) * (columns + 16) + 4 * CHUNK // 8


_PRODUCTS = record("product matrices count forms form_count tokens table weights chunk chunks")


@kernel(3)
def _chunk(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Multiplies a block of tokens with a chunk of rows."""
    job = carray(pointer(arguments), 1, _PRODUCTS)[0]
    matrices = carray(pointer(job.matrices), job.count, MATRIX)
    block, left = ticket // job.chunks * BLOCK, ticket % job.chunks
    for i in range(job.count):
        m = matrices[i]
        mine = (m.rows + job.chunk - 1) // job.chunk
        if left < mine:
            xs = carray(pointer(job.forms), job.form_count, FORM)[m.form].table + 8 * block
            weights = job.weights if job.weights == 0 else job.weights + 4 * block
            ys, count, first = job.table + 8 * block, min(BLOCK, job.tokens - block), left * job.chunk
            last = min(first + job.chunk, m.rows)
            call9(job.product, job.matrices + i * MATRIX_BYTES, 0, xs, ys, weights, count, first, last, scratch)
            return
        left -= mine


_CHUNK_JOB = _chunk.address


@function(*(types.int64,) * 5, MATRIX_OF_FLOATS, MATRIX_OF_FLOATS, types.int64)
def _multiply(block, arguments, arranged, arrange_job, chunk_job, x, y, weights):  # type: ignore[no-untyped-def]
    fill(block, arranged, arrange_job, x)
    jobs = carray(pointer(arguments), 1, _PRODUCTS)
    job = jobs[0]
    job.weights = weights
    table = carray(pointer(job.table), job.tokens, np.int64)
    for i in range(job.tokens):
        table[i] = y.ctypes.data + i * y.strides[0]
    run(block, chunk_job, arguments, job.chunks * ((job.tokens + BLOCK - 1) // BLOCK))


class Products:
    """Products of several matrices with the same x.

    Args:
        matrices: matrices with the same number of columns.
    """

    def __init__(self, matrices: Sequence[Matrix], workers: Workers) -> None:
        self._workers, self._formats, self.columns = workers, [m.format for m in matrices], matrices[0].columns
        self.rows = sum(m.rows for m in matrices)
        forms = Arranged(self._formats, self.columns, 1).form_of
        starts = np.cumsum([0] + [m.rows for m in matrices]).tolist()
        rows = [m.describe(form, at) for m, form, at in zip(matrices, forms, starts, strict=False)]
        self._matrices = np.array(rows, MATRIX)
        self._scratch, self._one = scratch_bytes(self.columns), self._job(1)
        self._last = 1, self._one  # number of tokens of the last small job, and that job

    def __call__(self, x: np.ndarray, y: np.ndarray, *, add: bool = False) -> np.ndarray:
        """Multiplies x with all matrices.

        Args:
            x: [T, columns] float32, with contiguous rows.
            y: [T, rows] float32, with contiguous rows. It is overwritten, or added to, and returned.
        """
        tokens = len(x)
        if tokens == 1:
            job = self._one
        elif tokens == self._last[0]:
            job = self._last[1]
        else:
            job = self._job(tokens)
            if tokens * self.columns <= KEPT:
                self._last = tokens, job
        address, ones, arranged, _ = job
        self._workers.call(
            _multiply, address, arranged, ARRANGE_JOB, _CHUNK_JOB, x, y, ones if add else 0, scratch=self._scratch
        )
        del job  # it owns the memory behind the addresses
        return y

    def _job(self, tokens: int) -> tuple[int, int, int, list[Any]]:
        """Returns the addresses of a job and of its arguments, with the owners of their memory."""
        chunk = max(8, CHUNK // self.columns // 8 * 8) if tokens < _ONE_BY_ONE else PANEL
        arranged = Arranged(self._formats, self.columns, tokens)
        ones, table = np.ones(tokens, np.float32), np.empty(tokens, np.int64)
        chunks = int((-(-self._matrices["rows"] // chunk)).sum())
        job = np.zeros(1, _PRODUCTS)
        forms = arranged.forms
        matrices = self._matrices.ctypes.data, len(self._matrices)
        job[0] = (PRODUCT, *matrices, forms.ctypes.data, len(forms), tokens, table.ctypes.data, 0, chunk, chunks)
        return job.ctypes.data, ones.ctypes.data, arranged.address, [job, ones, table, arranged]
