"""Computes SwiGLU experts from their records in place: y += Σ_e weight_e · down_e(silu(gate_e · x) · up_e · x)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import carray, types

from ...record import RecordLayout
from .arranged import Arranged, order_array
from .atomic import call4, call9
from .compiling import function, kernel
from .formats import Format
from .functions import sigmoid
from .memory import aligned, record
from .products import CHUNK, KEPT, MATRIX, MATRIX_BYTES, PANEL, PRODUCT, Matrix, scratch_bytes
from .rows import ARRANGE, pointer
from .workers import Workers, run

_DOWN_ROWS = 72  # rows of a ticket
_ROWS = 16  # hidden rows of a ticket

_ENTRY = record("matrices base first count gate_xs up_xs order chunks")
"""An expert with its rows: its matrices, the address of its bytes, tables of x, the order of its hidden rows, its
tickets.
"""

_EXPERTS = record("product arrange entries count rows gates ups hiddens weights ys chunk tickets hidden_size")


@kernel(3)
def _gate_up(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Computes a chunk of gate, up and silu(gate) · up of an expert, for all its rows."""
    job = carray(pointer(arguments), 1, _EXPERTS)[0]
    entries = carray(pointer(job.entries), job.count, _ENTRY)
    i = 0
    while ticket >= entries[i].chunks:
        ticket -= entries[i].chunks
        i += 1
    e = entries[i]
    m = carray(pointer(e.matrices), 3, MATRIX)
    first = ticket * job.chunk
    last = min(first + job.chunk, m[0].rows)
    gates, ups = job.gates + 8 * e.first, job.ups + 8 * e.first
    call9(job.product, e.matrices, e.base, e.gate_xs, gates, 0, e.count, first, last, scratch)
    call9(job.product, e.matrices + MATRIX_BYTES, e.base, e.up_xs, ups, 0, e.count, first, last, scratch)
    for r in range(e.count):
        gate = carray(pointer(carray(pointer(gates), e.count, np.int64)[r] + 4 * first), last - first, np.float32)
        up = carray(pointer(carray(pointer(ups), e.count, np.int64)[r] + 4 * first), last - first, np.float32)
        for j in range(last - first):
            gate[j] *= sigmoid(gate[j]) * up[j]


@kernel(3)
def _hidden(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Reorders hidden rows for the down projection of their expert."""
    job = carray(pointer(arguments), 1, _EXPERTS)[0]
    entries = carray(pointer(job.entries), job.count, _ENTRY)
    gates, hiddens = carray(pointer(job.gates), job.rows, np.int64), carray(pointer(job.hiddens), job.rows, np.int64)
    i = 0
    for row in range(ticket * _ROWS, min((ticket + 1) * _ROWS, job.rows)):
        while row >= entries[i].first + entries[i].count:
            i += 1
        m = carray(pointer(entries[i].matrices), 3, MATRIX)
        call4(job.arrange, entries[i].order, m[2].columns, gates[row], hiddens[row])


@kernel(3)
def _down(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Computes a chunk of the outputs of all experts in a fixed order, so that the sum is deterministic."""
    job = carray(pointer(arguments), 1, _EXPERTS)[0]
    entries = carray(pointer(job.entries), job.count, _ENTRY)
    first = ticket * _DOWN_ROWS
    last = min(first + _DOWN_ROWS, job.hidden_size)
    for i in range(job.count):
        e = entries[i]
        hiddens, ys, weights = job.hiddens + 8 * e.first, job.ys + 8 * e.first, job.weights + 4 * e.first
        matrix = e.matrices + 2 * MATRIX_BYTES
        call9(job.product, matrix, e.base, hiddens, ys, weights, e.count, first, last, scratch)


_GATE_UP_JOB, _HIDDEN_JOB, _DOWN_JOB = _gate_up.address, _hidden.address, _down.address


@function(*(types.int64,) * 5)
def _compute(block, arguments, gate_up, hidden, down):  # type: ignore[no-untyped-def]
    job = carray(pointer(arguments), 1, _EXPERTS)[0]
    run(block, gate_up, arguments, job.tickets)
    run(block, hidden, arguments, (job.rows + _ROWS - 1) // _ROWS)
    run(block, down, arguments, (job.hidden_size + _DOWN_ROWS - 1) // _DOWN_ROWS)


@dataclass(frozen=True)
class Swiglu:
    """The three matrices of an expert. Their parts are offsets in a record, or addresses."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @classmethod
    def of_record(cls, layout: RecordLayout) -> Swiglu:
        """Returns the matrices for records of a layout."""
        matrices = []
        for _, projection in layout.projections:
            stored = projection.format
            fmt = Format.of(stored.dtype, stored.quantization, stored.global_scale)
            offsets = [part.offset for part in projection.parts] + [0, 0]
            matrices.append(Matrix(fmt, projection.rows, projection.columns, (offsets[0], offsets[1], offsets[2])))
        return cls(*matrices)

    def describe(self, gate_form: int, up_form: int) -> np.ndarray:
        """Returns the three matrices as an array of :data:`~.products.MATRIX`."""
        rows = [self.gate.describe(gate_form), self.up.describe(up_form), self.down.describe()]
        return np.array(rows, MATRIX)


@dataclass(frozen=True)
class Rows:
    """An expert and the rows that are routed to it.

    Attributes:
        base: address of its record; None for the shared expert.
        tokens: [n] int64, indices of rows of x; weights: [n] float32.
    """

    base: int | None
    tokens: np.ndarray
    weights: np.ndarray


class Experts:
    """The experts of a layer.

    Args:
        routed: the matrices of routed experts; None if there is only the shared expert.
        shared: the shared expert, with addresses instead of offsets.
    """

    def __init__(self, routed: Swiglu | None, shared: Swiglu, workers: Workers) -> None:
        self._workers, self._kinds = workers, (routed or shared, shared)
        formats = [m.format for kind in self._kinds for m in (kind.gate, kind.up)]
        self._formats, self._hidden_size = formats, shared.gate.columns
        self._forms = Arranged(formats, self._hidden_size, 1).form_of
        self._matrices = [kind.describe(*self._forms[2 * i : 2 * i + 2]) for i, kind in enumerate(self._kinds)]
        downs = [kind.down for kind in self._kinds]
        self._orders = [order_array(m.format.arrangement(m.columns)) for m in downs]
        self._places = [
            (m.ctypes.data, order.ctypes.data) for m, order in zip(self._matrices, self._orders, strict=True)
        ]
        self._width = max(m.columns for m in downs)  # memory for hidden rows
        self._hidden_width = max(m.format.arranged(m.columns) for m in downs)
        self._scratch = scratch_bytes(max(self._hidden_size, self._width))
        self._one = self._last = Arranged(formats, self._hidden_size, 1)

    def arrange(self, x: np.ndarray) -> Arranged:
        """Reorders x, [T, H] float32, for :meth:`add`."""
        arranged = self._one if len(x) == 1 else self._last
        if len(x) != arranged.tokens:
            arranged = Arranged(self._formats, self._hidden_size, len(x))
            if x.size <= KEPT:
                self._last = arranged
        arranged.fill(x, self._workers)
        return arranged

    def add(self, arranged: Arranged, experts: Sequence[Rows], y: np.ndarray) -> None:
        """Adds the outputs of experts for their rows to y, one expert after the other.

        Args:
            y: [T, H] float32.
        """
        tokens = np.concatenate([e.tokens for e in experts])
        weights = np.concatenate([e.weights for e in experts])
        rows, most = len(tokens), max(len(e.tokens) for e in experts)
        tables = np.take(arranged.tables, tokens, axis=1)  # [forms, rows], addresses
        at, step = tables.ctypes.data, tables.strides[0]
        gates, hidden = aligned(2 * rows, self._width), aligned(rows, self._hidden_width)
        pointers = _addresses(gates), _addresses(hidden)
        chunk = max(8, CHUNK // (2 * self._hidden_size) // 8 * 8) if most == 1 else PANEL
        entries = np.empty(len(experts), _ENTRY)
        tickets = first = 0
        for i, expert in enumerate(experts):
            kind, count = int(expert.base is None), len(expert.tokens)
            matrices, order = self._places[kind]
            gate, up = (at + form * step + 8 * first for form in self._forms[2 * kind : 2 * kind + 2])
            chunks = -(-self._kinds[kind].gate.rows // chunk)
            entries[i] = (matrices, expert.base or 0, first, count, gate, up, order, chunks)
            tickets, first = tickets + chunks, first + count
        job, ys = np.zeros(1, _EXPERTS), y.ctypes.data + tokens * y.strides[0]
        job[0] = (
            PRODUCT, ARRANGE, entries.ctypes.data, len(experts), rows, pointers[0].ctypes.data, pointers[0][rows:].ctypes.data,
            pointers[1].ctypes.data, weights.ctypes.data, ys.ctypes.data, chunk, tickets, self._hidden_size,
        )  # fmt: skip
        self._workers.call(_compute, job.ctypes.data, _GATE_UP_JOB, _HIDDEN_JOB, _DOWN_JOB, scratch=self._scratch)


def _addresses(array: np.ndarray) -> np.ndarray:
    """Returns the address of each row."""
    return array.ctypes.data + np.arange(len(array)) * array.strides[0]
