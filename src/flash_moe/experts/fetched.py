"""The results of a fetch: loaded records, or records that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..record import RecordLayout
from .banks import put_together
from .read_queue import Reads
from .store_stats import StoreStats

Watcher = Callable[[int, Sequence[int], Sequence[int]], None]


@dataclass(frozen=True)
class Records:
    """Loaded records, in the order of the request.

    Attributes:
        arrays: one uint32 [words] array per record, or a single bank whose ``rows`` are the records.
        rows: rows of the bank; None if the arrays are separate.
        layout: layout of the records.
    """

    arrays: tuple[Any, ...]
    rows: tuple[int, ...] | None
    _on_use: Callable[[mx.array], None] | None = None
    layout: RecordLayout | None = None

    def stacked(self) -> mx.array:
        """Returns the records as one [K, words] array: a view if they are adjacent, else a copy."""
        if self.rows is None:
            return mx.stack(list(self.arrays))
        (bank,) = self.arrays
        if not isinstance(bank, mx.array):
            assert self.layout is not None
            return put_together(bank, self.rows, self.layout)
        first, count = self.rows[0], len(self.rows)
        if self.rows == tuple(range(first, first + count)):
            return bank[first : first + count]
        return bank[mx.array(self.rows)]

    def used_by(self, output: mx.array) -> None:
        """Tells the store that ``output`` reads these records.

        The store does not overwrite them until it is evaluated.
        """
        if self._on_use is not None:
            self._on_use(output)


@dataclass(frozen=True)
class Arrivals:
    """An iterator over records as [words] uint32 arrays, in the order of the request, each as soon as its bytes are
    loaded.

    Iteration waits for each record, and raises :class:`ExpertReadError` if one cannot be read completely. Callers
    iterate exactly once, to the end, because the store updates its counters there.
    """

    _found: Iterator[mx.array]
    _on_use: Callable[[mx.array], None]

    def __iter__(self) -> Iterator[mx.array]:
        return self._found

    def used_by(self, output: mx.array) -> None:
        """Tells the store that ``output`` reads these records, as :meth:`Records.used_by`.

        Call it after the last record.
        """
        self._on_use(output)


def as_array(record: np.ndarray) -> mx.array:
    """Returns the bytes of a record as [words] uint32: in place on Metal, copied elsewhere."""
    return mx.asarray(record.view(np.uint32))


class Begun(NamedTuple):
    """Prefetched reads of a record that no fetch has requested yet, and the counters that include them."""

    expert: int
    reads: Reads
    counting: tuple[StoreStats, ...]
