"""The one interface between the network and expert bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import ArgumentError
from ..record import RecordLayout


@dataclass
class StoreStats:
    """Counters since a store was opened.

    Attributes:
        fetches: calls of :meth:`ExpertStore.fetch`.
        bytes_requested: bytes of all records asked for.
        bytes_missing: those of them that were neither in the store's own memory nor in the page cache, when they were
            asked for or when a prefetch began to read them.
        bytes_unused: bytes that a prefetch read from outside the page cache, and the next fetch did not ask for.
        fetch_seconds: time spent inside fetch.
    """

    fetches: int = 0
    bytes_requested: int = 0
    bytes_missing: int = 0
    bytes_unused: int = 0
    fetch_seconds: float = 0.0


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


class ExpertStore(ABC):
    """Brings the records of routed experts into view.

    Attributes:
        layouts: record layout by layer.
        capacity: the most records that one fetch may ask for.
        holds_everything: whether every record is in the store's own memory for good.
    """

    layouts: Mapping[int, RecordLayout]
    capacity: int
    holds_everything = False

    def __init__(self, layouts: Mapping[int, RecordLayout], capacity: int) -> None:
        self.layouts, self.capacity, self.stats = layouts, capacity, StoreStats()
        self._missing: dict[int, dict[int, int]] = {}  # by layer and expert, since the layer's last fetch

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
        for expert, nbytes in self._missing.pop(layer, {}).items():
            if expert in experts:
                self.stats.bytes_missing += nbytes
            else:
                self.stats.bytes_unused += nbytes
        self.stats.fetches += 1
        self.stats.bytes_requested += self.layouts[layer].stride * len(experts)
        self.stats.fetch_seconds += time.perf_counter() - start
        return records

    @abstractmethod
    def _fetch(self, layer: int, experts: Sequence[int]) -> Records: ...

    def _reads(self, layer: int, expert: int, missing: int) -> None:
        """A record is about to be read, of which so many bytes are outside the page cache."""
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
            self.stats.fetches += 1
            self.stats.bytes_requested += self.layouts[layer].stride * count
        return bank

    def _whole(self, layer: int) -> mx.array | None:
        return None

    @abstractmethod
    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Starts bringing records closer without waiting; a failure shows in the fetch that needs them."""

    @abstractmethod
    def close(self) -> None:
        """Releases files and threads; the store cannot be used afterwards."""
