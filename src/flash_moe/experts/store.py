"""The interface between the network and the bytes of experts."""

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
    """Fetches the records of routed experts. Only one thread at a time may fetch. Any thread may close the store.

    Attributes:
        layouts: the record layout of each layer.
        capacity: maximum number of records in one fetch.
        can_evict: whether :meth:`evict` has an effect.
        holds_everything: whether every record is permanently in the store's own memory.
        by_part: whether the banks have one array per part.
        keeps_experts: whether records stay in a bank after their fetch, so that :meth:`ahead` can locate them.
        copies: whether a fetch copies records from the page cache, so that prefetching can save that time too.
        stats, by_layer: counters of all layers together, and of each layer.
        arrived: number of records that fetches have returned.
        evict_others: function that calls :meth:`evict` on other machines; None for a single machine.
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
        self._begun: defaultdict[int, list[Begun]] = defaultdict(list)  # by layer, since the last fetch of the layer
        self._counting: tuple[StoreStats, ...] = ()
        self.arrived = 0
        self.evict_others: Callable[[bool], None] | None = None
        self._cancelled: Callable[[], bool] | None = None
        self._last = time.perf_counter()

    @contextmanager
    def counting(self, stats: StoreStats) -> Iterator[StoreStats]:
        """Also counts fetches inside the block in ``stats``, e.g. those of one of several users of the store."""
        outer = self._counting
        self._counting = *outer, stats
        try:
            yield stats
        finally:
            self._counting = outer

    def fetch(self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None) -> Records:
        """Fetches the records of experts of a layer (distinct, at most ``capacity``) and waits for their bytes.

        Args:
            meanwhile: function that is called after the reads have begun. Reads that it starts are queued behind them.

        Raises:
            ExpertReadError: a record could not be read completely. Then no record is returned.
            ArgumentError: there are more than ``capacity`` records.
            ModelClosedError: the store was closed, before or during the fetch.
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
        """Fetches as :meth:`fetch_each` does, but yields the bytes of each record in place, for the CPU kernels.

        The reads have begun when this method returns. The bytes are valid until the next fetch.

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
        """Fetches as :meth:`fetch` does, but yields each record as soon as it is loaded, while others are being read."""
        found: list[Any] = []

        def arrays() -> Iterator[mx.array]:
            bank = self._bank_of(layer)
            assert not isinstance(bank, dict), "banks lie by part only on GPUs"
            for record in self._arrivals(layer, experts, meanwhile):
                found.append(record)
                # a slice is a view; an index would copy
                yield as_array(record) if bank is None else bank[record : record + 1].reshape(-1)

        return Arrivals(arrays(), lambda output: self._used(found, output))

    def _arrivals(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Any]:
        """Yields the results of :meth:`_arrive` and updates all counters. The reads have begun when this method
        returns.

        Time that the caller spends between two records does not count as waiting. The time of ``meanwhile`` does.
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
            self._cancel(layer)  # no caller waits for the others
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
        read: dict[int, int] = {}  # missing bytes of each record that was not in the store's own memory
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
        """Records that the reads of a record have begun."""
        self._begun[layer].append(Begun(expert, reads, self._counting))

    def _cancel(self, layer: int, wanted: Sequence[int] = ()) -> None:
        """Cancels the reads of a layer that have not begun, except those of the wanted experts."""
        for begun in self._begun.get(layer, ()):
            if begun.expert not in wanted and begun.reads.cancel():
                self._lost(layer, begun.expert)

    def _lost(self, layer: int, expert: int) -> None:
        """Handles a record whose read was cancelled."""

    @abstractmethod
    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        """Starts to load all records.

        Returns:
            An iterator that waits for one record after the other, and yields its row of :meth:`_bank_of` or its bytes.
        """

    def _bank_of(self, layer: int) -> Bank | None:
        """Returns the bank with the rows of :meth:`_arrive`; None if each record is a separate array."""
        return None

    def _used(self, found: Sequence[Any], output: mx.array) -> None:
        """Records that ``output`` reads the records that :meth:`_arrive` found."""

    def _counters(self, layer: int, counting: tuple[StoreStats, ...] = ()) -> tuple[StoreStats, ...]:
        """Returns the counters of a layer."""
        return self.stats, self.by_layer[layer], *counting

    @abstractmethod
    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        """Returns which records a fetch would get without reading bytes from outside memory, or are being read already.

        Raises:
            ExpertReadError: a file cannot be opened or has changed.
        """

    def whole(self, layer: int, count: int) -> Bank | None:
        """Returns the bank of a fully resident layer, [E, words] uint32 in the order of expert ids; else None.

        With this bank, the host need not know the experts of a token. The call counts as a fetch of ``count`` records.
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
        """Returns the bank, and the row of each expert of a layer in it, [E] uint32."""
        raise NotImplementedError(f"{type(self).__name__} keeps no experts")

    def use_loaded(self, layers: Sequence[int], ids: np.ndarray) -> int:
        """Counts the experts of a token that ran ahead as fetches, up to the first layer with a missing expert.

        Args:
            layers: the layers that the token passed, in order.
            ids: [layers, K], the experts of the token in each layer.

        Returns:
            The number of layers, from the first one, whose experts were all loaded.
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
        """Returns the result of :meth:`use_loaded`, and marks the experts of these layers as most recently used."""
        raise NotImplementedError(f"{type(self).__name__} keeps no experts")

    @abstractmethod
    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Starts to load records without waiting. Errors are raised by the fetch that needs the records."""

    def evict(self, *, flush: bool = False) -> None:
        """Drops all records from memory and asks the system to drop them from the page cache, for measurements.

        All outputs that use records must be evaluated. A resident store keeps its records. For ``flush``, see
        :meth:`~flash_moe.experts.mapped_file.MappedFile.evict`.
        """
        self._evict(flush)
        if self.evict_others is not None:
            self.evict_others(flush)
        self.mark()

    def mark(self) -> None:
        """Restarts the clock for the seconds that the next fetch counts for its layer."""
        self._last = time.perf_counter()

    def _evict(self, flush: bool) -> None:
        """Does nothing: all records stay."""

    def cached_bytes(self) -> int:
        """Returns the bytes of the record files that are in the page cache; 0 if the store needs no files."""
        return 0

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        """Sets a function that every fetch calls at its beginning and while it waits for reads; None removes it.

        If it returns True, the fetch ends with :class:`~flash_moe.errors.Cancelled`.
        """
        self._cancelled = cancelled

    def _check(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the fetch was cancelled")

    @abstractmethod
    def close(self) -> None:
        """Closes the store: releases files, threads and memory.

        Later fetches, and fetches that wait in other threads, raise :class:`~flash_moe.errors.ModelClosedError`. A file
        stays open, and the memory for its bytes allocated, until running reads have ended.
        """
