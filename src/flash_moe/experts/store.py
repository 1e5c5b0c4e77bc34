"""The one interface between the network and expert bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError, Cancelled
from ..record import RecordLayout
from .banks import Bank
from .fetched import Arrivals, Begun, Records, as_array
from .read_queue import Reads
from .store_stats import StoreStats
from .uses import Watched

__all__ = ["Arrivals", "Bank", "ExpertStore", "Records", "StoreStats"]


class ExpertStore(Watched, ABC):
    """Fetches the records of routed experts. One thread at a time fetches; any thread may close.

    Attributes:
        layouts: record layout by layer.
        capacity: the most records that one fetch may ask for.
        can_evict: whether :meth:`evict` does anything.
        holds_everything: whether every record is in the store's own memory for good.
        by_part: whether its banks have an array for each part of the records.
        keeps_experts: whether records stay in a bank beyond their fetch, and :meth:`ahead` says where.
        copies: whether a fetch copies what the page cache has, so that reading ahead can save time there, too.
        stats, by_layer: counters of all layers together, and of each.
        arrived: records that fetches have handed out.
        evict_others: does what :meth:`evict` does in the stores of other machines; None for one machine.
    """

    layouts: Mapping[int, RecordLayout]
    capacity: int
    can_evict = True
    holds_everything = False
    keeps_experts = False
    copies = False
    by_part = False
    stats: StoreStats
    by_layer: Mapping[int, StoreStats]

    def __init__(self, layouts: Mapping[int, RecordLayout], capacity: int) -> None:
        self.layouts, self.capacity, self.stats = layouts, capacity, StoreStats()
        self.by_layer = {layer: StoreStats() for layer in layouts}
        self._begun: defaultdict[int, list[Begun]] = defaultdict(list)  # by layer, since its last fetch
        self._counting: tuple[StoreStats, ...] = ()
        self.arrived = 0
        self.evict_others: Callable[[bool], None] | None = None
        self._cancelled: Callable[[], bool] | None = None
        self._last = time.perf_counter()

    @contextmanager
    def counting(self, stats: StoreStats) -> Iterator[StoreStats]:
        """Also counts in ``stats`` what is fetched within: the share of one of several users of the store."""
        outer = self._counting
        self._counting = *outer, stats
        try:
            yield stats
        finally:
            self._counting = outer

    def fetch(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None) -> Records:
        """Returns the records of ``experts`` (distinct, at most ``capacity``) of a layer; waits for their bytes.

        Args:
            meanwhile: called when their reads have begun. Reads that it starts line up behind them.

        Raises:
            ExpertReadError: a record could not be read whole; no record is handed out then.
            ArgumentError: more than ``capacity`` records.
            ModelClosedError: the store was closed, perhaps by another thread meanwhile.
            Cancelled: see :meth:`stop_if`.
        """
        bank, arrivals = self._bank_of(layer), self._arrivals(layer, experts, meanwhile)
        if bank is None:
            return Records(tuple(as_array(record) for record in arrivals), None)
        found = list(arrivals)
        return Records((bank,), tuple(found), partial(self._used, found), self.layouts[layer])

    def fetch_bytes(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[np.ndarray]:
        """As :meth:`fetch_each`, but each record as bytes where they lie, without a copy, for kernels of the CPU.

        Reads have begun when this returns. The bytes stay as they are until the next fetch.

        Returns:
            [stride] uint8 arrays.
        """
        found = self._arrivals(layer, experts, meanwhile)
        if (bank := self._bank_of(layer)) is None:
            return found
        assert isinstance(bank, mx.array), "banks lie by part only on GPUs"
        rows = np.array(bank, copy=False).view(np.uint8)
        return (rows[row] for row in found)

    def fetch_each(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None) -> Arrivals:
        """As :meth:`fetch`, but hands out each record when it is there, while those behind it are read."""
        found: list[Any] = []

        def arrays() -> Iterator[mx.array]:
            bank = self._bank_of(layer)
            assert not isinstance(bank, dict), "banks lie by part only on GPUs"
            for record in self._arrivals(layer, experts, meanwhile):
                found.append(record)
                # a slice is a view, where an index would copy
                yield as_array(record) if bank is None else bank[record : record + 1].reshape(-1)

        return Arrivals(arrays(), lambda output: self._used(found, output))

    def _arrivals(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Any]:
        """What :meth:`_arrive` finds, and all counters. Reads have begun when this returns.

        Seconds in which the caller works between two records do not count as waiting; those of ``meanwhile`` do.
        """
        if len(experts) > self.capacity:
            raise ArgumentError(
                f"{len(experts)} records of layer {layer} at once, but this store holds {self.capacity}; ask for fewer"
            )
        self._check()
        start = time.perf_counter()
        try:
            arriving = self._arrive(layer, experts)
            self._cancel(layer, experts)
            if meanwhile is not None:
                meanwhile()
        except BaseException:
            self._cancel(layer)  # nobody waits for the others any more
            raise
        return self._wait(layer, experts, arriving, time.perf_counter() - start)

    def _wait(self, layer: int, experts: Sequence[int], arriving: Iterator[Any], waited: float) -> Iterator[Any]:
        start = time.perf_counter()
        try:
            for record in arriving:
                waited += time.perf_counter() - start
                self.arrived += 1
                yield record
                start = time.perf_counter()
        except BaseException:
            self._cancel(layer)
            raise
        end = time.perf_counter()
        read: dict[int, int] = {}  # missing bytes of records that were not in the store's own memory
        for expert, reads, counting in self._begun.pop(layer, ()):
            if expert in experts:
                read[expert] = reads.missing
            else:
                for stats in self._counters(layer, counting):
                    stats.bytes_unused += reads.missing
        for stats in self._counters(layer, self._counting):
            stats.count(self.layouts[layer].stride, len(experts), read, waited + end - start, end - self._last)
        self._last = end
        for used in self._watchers:
            used(layer, experts, [read.get(expert, 0) for expert in experts])

    def _note(self, layer: int, expert: int, reads: Reads) -> None:
        """The reads of a record have begun."""
        self._begun[layer].append(Begun(expert, reads, self._counting))

    def _cancel(self, layer: int, wanted: Sequence[int] = ()) -> None:
        """Cancels what has not begun of the reads of a layer, except those of the wanted experts."""
        for begun in self._begun.get(layer, ()):
            if begun.expert not in wanted and begun.reads.cancel():
                self._lost(layer, begun.expert)

    def _lost(self, layer: int, expert: int) -> None:
        """The read of a record was cancelled."""

    @abstractmethod
    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        """Starts bringing all records.

        Returns:
            What waits for one after the other and finds it: its row of :meth:`_bank_of`, or its bytes.
        """

    def _bank_of(self, layer: int) -> Bank | None:
        """Returns the array that :meth:`_arrive` finds rows of; None where records are arrays of their own."""
        return None

    def _used(self, found: Sequence[Any], output: mx.array) -> None:
        """Output reads these, as :meth:`_arrive` found them."""

    def _counters(self, layer: int, counting: tuple[StoreStats, ...] = ()) -> tuple[StoreStats, ...]:
        """Where something of a layer is counted."""
        return self.stats, self.by_layer[layer], *counting

    @abstractmethod
    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        """Returns which records would be fetched without reading a byte that is outside memory, or are on their way.

        Raises:
            ExpertReadError: a file cannot be opened or was changed.
        """

    def whole(self, layer: int, count: int) -> Bank | None:
        """Returns all records of a layer by expert id, [E, words] uint32, where the store holds them for good; else
        None.

        Then nobody needs to know which of them a token uses. Counts as a fetch of ``count`` records.
        """
        self._check()
        bank = self._whole(layer)
        if bank is not None:
            for stats in self._counters(layer, self._counting):
                stats.fetches += 1
                stats.bytes_requested += self.layouts[layer].stride * count
        return bank

    def _whole(self, layer: int) -> Bank | None:
        return None

    def ahead(self, layer: int) -> tuple[Bank, mx.array]:
        """Returns the bank, and the row in it of each expert of a layer, [E] uint32: any row for one that is not
        loaded.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no experts")

    def use_loaded(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Counts what a token that ran ahead used, as fetches, as far as all was loaded.

        Args:
            layers: through which it went, in order.
            ids: [layers, K], the experts that it used in each.

        Returns:
            How many of the layers, from the first on, had all their experts.
        """
        self._check()
        count = self._loaded_layers(layers, ids)
        for layer, experts in zip(layers[:count], ids, strict=False):
            for stats in self._counters(layer, self._counting):
                stats.fetches += 1
                stats.bytes_requested += self.layouts[layer].stride * len(experts)
        self._last = time.perf_counter()
        return count

    def _loaded_layers(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Returns what :meth:`use_loaded` returns; the experts of these layers are the latest used."""
        raise NotImplementedError(f"{type(self).__name__} keeps no experts")

    @abstractmethod
    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Starts bringing records closer without waiting; a failure shows in the fetch that needs them."""

    def evict(self, *, flush: bool = False) -> None:
        """Forgets all records and asks the system to drop them from the page cache, as measurements need it.

        No output of theirs may be unevaluated. A resident store keeps what it holds. ``flush`` is that of
        :meth:`~flash_moe.experts.mapped_file.MappedFile.evict`.
        """
        self._evict(flush)
        if self.evict_others is not None:
            self.evict_others(flush)
        self.mark()

    def mark(self) -> None:
        """Begins anew what the next fetch counts as the seconds of its layer."""
        self._last = time.perf_counter()

    def _evict(self, flush: bool) -> None:
        """Everything stays."""

    def cached_bytes(self) -> int:
        """Returns bytes of the files with records that are in the page cache; 0 where the store needs no file."""
        return 0

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        """Has every fetch ask ``cancelled`` when it begins and while it waits for reads; None asks nobody.

        Where it says yes, the fetch ends with :class:`~flash_moe.errors.Cancelled`.
        """
        self._cancelled = cancelled

    def _check(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the fetch was cancelled")

    @abstractmethod
    def close(self) -> None:
        """Releases files, threads and memory.

        From then on fetches raise :class:`~flash_moe.errors.ModelClosedError`, also those that wait in other threads.
        A file stays open, and the memory it is read into allocated, until the reads under way have ended.
        """
