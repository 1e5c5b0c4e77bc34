"""The one interface between the network and expert bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import mlx.core as mx

from ..errors import ArgumentError
from ..record import RecordLayout


@dataclass
class StoreStats:
    """Counters since a store was opened, of all layers or of one.

    Attributes:
        fetches: calls of :meth:`ExpertStore.fetch`.
        bytes_requested: bytes of all records asked for.
        bytes_brought: those of them that were not in the store's own memory, but in the page cache or only in files.
        bytes_missing: those of them that were not in the page cache either, when they were asked for or when a prefetch
            began to read them.
        bytes_unused: bytes that a prefetch read from outside the page cache, and the next fetch did not ask for.
        fetch_seconds: time spent inside fetch.
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

    def each(self) -> list[mx.array]:
        """The records as [words] arrays, without a copy."""
        if self.rows is None:
            return list(self.arrays)
        (bank,) = self.arrays
        return [bank[row] for row in self.rows]

    def used_by(self, output: mx.array) -> None:
        """Tells the store that ``output`` reads these records: they stay as they are until it has been evaluated."""
        if self._on_use is not None:
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
        self._missing: dict[int, dict[int, int]] = {}  # by layer and expert, since the layer's last fetch
        self._last = time.perf_counter()

    def fetch(self, layer: int, experts: Sequence[int]) -> Records:
        """Returns the records of ``experts`` (distinct, at most ``capacity``) of a layer; waits for their bytes.

        Raises:
            ExpertReadError: a record could not be read whole; no record is handed out then.
            ArgumentError: more than ``capacity`` records.
        """
        if len(experts) > self.capacity:
            raise ArgumentError(
                f"{len(experts)} records of layer {layer} at once, but this store holds {self.capacity}; ask for fewer"
            )
        start = time.perf_counter()
        records = self._fetch(layer, experts)
        end = time.perf_counter()
        missing = self._missing.pop(layer, {})
        used = sum(nbytes for expert, nbytes in missing.items() if expert in experts)
        for stats in self._counters(layer):
            stats.fetches += 1
            stats.bytes_requested += self.layouts[layer].stride * len(experts)
            stats.bytes_missing += used
            stats.bytes_unused += sum(missing.values()) - used
            stats.fetch_seconds += end - start
            stats.seconds += end - self._last
        self._last = end
        return records

    @abstractmethod
    def _fetch(self, layer: int, experts: Sequence[int]) -> Records: ...

    def _counters(self, layer: int) -> tuple[StoreStats, StoreStats]:
        """Where something of a layer is counted."""
        return self.stats, self.by_layer[layer]

    def _count_brought(self, layer: int, expert: int, missing: int) -> None:
        """A record is about to be read, of which so many bytes are outside the page cache."""
        for stats in self._counters(layer):
            stats.bytes_brought += self.layouts[layer].stride
        if missing:
            of_layer = self._missing.setdefault(layer, {})
            of_layer[expert] = of_layer.get(expert, 0) + missing

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
