"""The results of a fetch: records that are all loaded, or that arrive one by one."""

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
    """Loaded records, in the order they were asked for.

    Attributes:
        arrays: one uint32 [words] array per record, or a single bank of which ``rows`` are the records.
        rows: rows of the bank; None when the arrays are separate.
        layout: of a bank's records.
    """

    arrays: tuple[Any, ...]
    rows: tuple[int, ...] | None
    _on_use: Callable[[mx.array], None] | None = None
    layout: RecordLayout | None = None

    def stacked(self) -> mx.array:
        """Returns the records as one [K, words] array (a view where they already lie side by side, else a copy)."""
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
        """Tells the store that ``output`` reads these records: they stay as they are until it has been evaluated."""
        if self._on_use is not None:
            self._on_use(output)


@dataclass(frozen=True)
class Arrivals:
    """Records on their way: [words] uint32 arrays in the order they were asked for, each as soon as its bytes are there.

    Iterating waits, and raises :class:`ExpertReadError` where a record could not be read whole. It is iterated once, to its
    end: what the store counts is counted there.
    """

    _found: Iterator[mx.array]
    _on_use: Callable[[mx.array], None]

    def __iter__(self) -> Iterator[mx.array]:
        return self._found

    def used_by(self, output: mx.array) -> None:
        """As :meth:`Records.used_by`, after the last record has arrived."""
        self._on_use(output)


def as_array(record: np.ndarray) -> mx.array:
    """Returns bytes of a record as [words] uint32: in place on Metal, copied elsewhere."""
    return mx.asarray(record.view(np.uint32))


class Begun(NamedTuple):
    """The reads of a record that the next fetch of its layer has not asked for yet, and who is counting them."""

    expert: int
    reads: Reads
    counting: tuple[StoreStats, ...]
