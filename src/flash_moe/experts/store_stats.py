"""The counters of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass


@dataclass
class StoreStats:
    """Counters since a store was opened, of all layers or of one; or those of one generation.

    Attributes:
        fetches: calls of :meth:`ExpertStore.fetch` and :meth:`ExpertStore.fetch_each`.
        bytes_requested: bytes of all records asked for.
        bytes_loaded: those of them that were not in the store's own memory, but in the page cache or only in files.
        bytes_missing: those of them that were not in the page cache either, when their reads were asked for; slots ask
            of a sample of each record.
        bytes_unused: bytes that a prefetch read from outside the page cache, and the next fetch did not ask for.
        fetch_seconds: time spent waiting in them.
        seconds: time from the end of the fetch before, of whatever layer, to the end of each fetch.
    """

    fetches: int = 0
    bytes_requested: int = 0
    bytes_loaded: int = 0
    bytes_missing: int = 0
    bytes_unused: int = 0
    fetch_seconds: float = 0.0
    seconds: float = 0.0

    def since(self, before: StoreStats) -> StoreStats:
        """Returns what was counted after ``before`` was copied from these counters."""
        return StoreStats(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    def count(self, stride: int, requested: int, loaded: Mapping[int, int], waited: float, seconds: float) -> None:
        """Counts a fetch.

        Args:
            requested: records of ``stride`` bytes. loaded: missing bytes of those that were not in the store's memory.
        """
        self.fetches += 1
        self.bytes_requested += stride * requested
        self.bytes_loaded += stride * len(loaded)
        self.bytes_missing += sum(loaded.values())
        self.fetch_seconds += waited
        self.seconds += seconds
