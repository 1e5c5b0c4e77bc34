"""The one interface between the network and expert bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ..errors import ArgumentError
from ..record import RecordLayout
from .read_queue import Reads


@dataclass
class StoreStats:
    """Counters since a store was opened, of all layers or of one.

    Attributes:
        fetches: calls of :meth:`ExpertStore.fetch` and :meth:`ExpertStore.fetch_each`.
        bytes_requested: bytes of all records asked for.
        bytes_brought: those of them that were not in the store's own memory, but in the page cache or only in files.
        bytes_missing: those of them that were not in the page cache either, when their reads were asked for; slots ask
            of a sample of each record.
        bytes_unused: bytes that a prefetch read from outside the page cache, and the next fetch did not ask for.
        fetch_seconds: time spent waiting in them.
        seconds: time from the end of the fetch before, of whatever layer, to the end of each fetch.
    """

    fetches: int = 0
    bytes_requested: int = 0
    bytes_brought: int = 0
    bytes_missing: int = 0
    bytes_unused: int = 0
    fetch_seconds: float = 0.0
    seconds: float = 0.0

    def since(self, before: StoreStats) -> StoreStats:
        """What was counted after ``before`` was copied from these counters."""
        return StoreStats(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class Records:
    """Records in view, in the order they were asked for.

    Attributes:
        arrays: one uint32 [words] array per record, or a single [N, words] bank of which ``rows`` are the records.
        rows: rows of the bank; None when the arrays are separate.
    """

    arrays: tuple[mx.array, ...]
    rows: tuple[int, ...] | None
    _on_use: Callable[[mx.array], None] | None = None

    def stacked(self) -> mx.array:
        """The records as one [K, words] array (a view where they already lie side by side, else a copy)."""
        if self.rows is None:
            return mx.stack(list(self.arrays))
        (bank,) = self.arrays
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


class ExpertStore(ABC):
    """Brings the records of routed experts into view.

    Attributes:
        layouts: record layout by layer.
        capacity: the most records that one fetch may ask for.
        can_evict: whether :meth:`evict` does anything.
        holds_everything: whether every record is in the store's own memory for good.
        stats, by_layer: counters of all layers together, and of each.
    """

    layouts: Mapping[int, RecordLayout]
    capacity: int
    can_evict = True
    holds_everything = False
    stats: StoreStats
    by_layer: Mapping[int, StoreStats]

    def __init__(self, layouts: Mapping[int, RecordLayout], capacity: int) -> None:
        self.layouts, self.capacity, self.stats = layouts, capacity, StoreStats()
        self.by_layer = {layer: StoreStats() for layer in layouts}
        # by layer, since its last fetch: experts and their reads
        self._begun: defaultdict[int, list[tuple[int, Reads]]] = defaultdict(list)
        self._last = time.perf_counter()

    def fetch(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None) -> Records:
        """Returns the records of ``experts`` (distinct, at most ``capacity``) of a layer; waits for their bytes.

        Args:
            meanwhile: called when their reads have begun. Reads that it starts line up behind them.

        Raises:
            ExpertReadError: a record could not be read whole; no record is handed out then.
            ArgumentError: more than ``capacity`` records.
        """
        found = list(self._arrivals(layer, experts, meanwhile))
        bank = self._bank_of(layer)
        if bank is None:
            return Records(tuple(found), None)
        return Records((bank,), tuple(found), partial(self._used, found))

    def fetch_each(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None) -> Arrivals:
        """As :meth:`fetch`, but hands out each record when it is there, while those behind it are read."""
        found: list[Any] = []

        def arrays() -> Iterator[mx.array]:
            bank = self._bank_of(layer)
            for record in self._arrivals(layer, experts, meanwhile):
                found.append(record)
                # a slice is a view, where an index would copy
                yield record if bank is None else bank[record : record + 1].reshape(-1)

        return Arrivals(arrays(), lambda output: self._used(found, output))

    def _arrivals(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None) -> Iterator[Any]:
        """What :meth:`_arrive` finds, and all counters.

        Seconds in which the caller works between two records do not count as waiting; those of ``meanwhile`` do.
        """
        if len(experts) > self.capacity:
            raise ArgumentError(
                f"{len(experts)} records of layer {layer} at once, but this store holds {self.capacity}; ask for fewer"
            )
        waited, start = 0.0, time.perf_counter()
        arriving = self._arrive(layer, experts)
        if meanwhile is not None:
            meanwhile()
        for record in arriving:
            waited += time.perf_counter() - start
            yield record
            start = time.perf_counter()
        end = time.perf_counter()
        brought, missing, unused = set(), 0, 0
        for expert, reads in self._begun.pop(layer, ()):
            if expert in experts:
                brought.add(expert)
                missing += reads.missing
            else:
                unused += reads.missing
        for stats in self._counters(layer):
            stats.fetches += 1
            stats.bytes_requested += self.layouts[layer].stride * len(experts)
            stats.bytes_brought += self.layouts[layer].stride * len(brought)
            stats.bytes_missing += missing
            stats.bytes_unused += unused
            stats.fetch_seconds += waited + end - start
            stats.seconds += end - self._last
        self._last = end

    @abstractmethod
    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        """Starts bringing all records.

        Returns:
            What waits for one after the other and finds it: its row of :meth:`_bank_of`, or its array.
        """

    def _bank_of(self, layer: int) -> mx.array | None:
        """The array that :meth:`_arrive` finds rows of; None where records are arrays of their own."""
        return None

    def _used(self, found: Sequence[Any], output: mx.array) -> None:  # noqa: B027 (only slots are ever overwritten)
        """Output reads these, as :meth:`_arrive` found them."""

    def _counters(self, layer: int) -> tuple[StoreStats, StoreStats]:
        """Where something of a layer is counted."""
        return self.stats, self.by_layer[layer]

    @abstractmethod
    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        """Which records would be fetched without reading a byte that is outside memory, or are on their way.

        Raises:
            ExpertReadError: a file cannot be opened or was changed.
        """

    def whole(self, layer: int, count: int) -> mx.array | None:
        """All records of a layer by expert id, [E, words] uint32, where the store holds them for good; else None.

        Then nobody needs to know which of them a token uses. Counts as a fetch of ``count`` records.
        """
        bank = self._whole(layer)
        if bank is not None:
            for stats in self._counters(layer):
                stats.fetches += 1
                stats.bytes_requested += self.layouts[layer].stride * count
        return bank

    def _whole(self, layer: int) -> mx.array | None:
        return None

    @abstractmethod
    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Starts bringing records closer without waiting; a failure shows in the fetch that needs them."""

    def evict(self, *, flush: bool = False) -> None:
        """Forgets all records and asks the system to drop them from the page cache, as measurements need it.

        No output of theirs may be unevaluated. A resident store keeps what it holds. ``flush`` is that of
        :meth:`~flash_moe.experts.files.MappedFile.evict`.
        """
        self._evict(flush)
        self.mark()

    def mark(self) -> None:
        """Begins anew what the next fetch counts as the seconds of its layer."""
        self._last = time.perf_counter()

    def _evict(self, flush: bool) -> None:  # noqa: B027 (a store that cannot evict leaves it as it is)
        """Everything stays."""

    def cached_bytes(self) -> int:
        """Bytes of the files with records that are in the page cache; 0 where the store needs no file."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Releases files and threads; the store cannot be used afterwards."""
