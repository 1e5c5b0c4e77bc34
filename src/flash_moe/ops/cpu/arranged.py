"""Reorders x to match the stored order of weights, with one copy per form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numba import carray, types

from .atomic import call4
from .compiling import MATRIX, function, kernel
from .formats import Format
from .memory import aligned, record
from .rows import ARRANGE, pointer
from .workers import Workers, run

FORM = record("order target width table")
"""A form: the address of its order, the address of its rows, the bytes per row, and a table of row addresses."""

_ARRANGE = record("arrange forms count tokens columns x x_step")


class Arranged:
    """Memory for x [T, columns] in the order of each format. Formats with the same order share it.

    Attributes:
        tokens: the number of tokens T.
    """

    def __init__(self, formats: Sequence[Format], columns: int, tokens: int) -> None:
        self.tokens = tokens
        self.form_of, orders, widths = _forms(tuple(formats), columns)
        self.tables = np.empty((len(widths), tokens), np.int64)
        self.forms = np.empty(len(widths), FORM)
        self._memory = [orders, *(aligned(tokens, width, dtype=np.uint8) for width in widths)]
        places, numbers, table = (
            [memory.ctypes.data for memory in self._memory],
            np.arange(tokens),
            self.tables.ctypes.data,
        )
        for i, (width, place) in enumerate(zip(widths, places[1:], strict=True)):
            self.tables[i] = place + numbers * width
            self.forms[i] = places[0] + i * orders.strides[0], place, width, table + i * self.tables.strides[0]
        self._record = np.empty(1, _ARRANGE)
        self._record[0] = ARRANGE, self.forms.ctypes.data, len(widths), tokens, columns, 0, 0
        self.address = self._record.ctypes.data

    def fill(self, x: np.ndarray, workers: Workers) -> None:
        """Reorders x, [T, columns] float32."""
        workers.call(fill, self.address, ARRANGE_JOB, x)


@lru_cache(maxsize=64)
def _forms(formats: tuple[Format, ...], columns: int) -> tuple[list[int], np.ndarray, list[int]]:
    """Returns the index of the form of each format, and the order and the bytes per row of each form."""
    orders = [fmt.arrangement(columns) for fmt in formats]
    widths = {order: 4 * fmt.arranged(columns) for order, fmt in zip(orders, formats, strict=True)}
    arrays = np.stack([order_array(order) for order in widths])
    return [list(widths).index(order) for order in orders], arrays, list(widths.values())


def order_array(order: tuple[int, ...]) -> np.ndarray:
    """Returns :meth:`Format.arrangement` as an array for :func:`~.rows.arrange`."""
    array = np.zeros(16, np.int64)
    array[: len(order)] = order
    return array


@kernel(3)
def _arrange(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    """Reorders one row of x for each form."""
    job = carray(pointer(arguments), 1, _ARRANGE)[0]
    forms = carray(pointer(job.forms), job.count, FORM)
    for i in range(job.count):
        call4(
            job.arrange,
            forms[i].order,
            job.columns,
            job.x + ticket * job.x_step,
            forms[i].target + ticket * forms[i].width,
        )


ARRANGE_JOB = _arrange.address


@function(types.int64, types.int64, types.int64, MATRIX)
def fill(block, arguments, job, x):  # type: ignore[no-untyped-def]
    """Reorders all rows of x."""
    records = carray(pointer(arguments), 1, _ARRANGE)
    records[0].x, records[0].x_step = x.ctypes.data, x.strides[0]
    run(block, job, arguments, records[0].tokens)
