"""The counters of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass


@dataclass
class StoreStats:
    """Counters of a store since it was opened, of all layers or of one, or only for one generation.

    Attributes:
        fetches: number of calls of :meth:`ExpertStore.fetch` and :meth:`ExpertStore.fetch_each`.
        bytes_requested: bytes of all requested records.
        bytes_loaded: requested bytes that were not in the store's own memory, but in the page cache or only in files.
        bytes_missing: loaded bytes that were not in the page cache either, when they were requested. Slots check a
            sample of each record.
        bytes_unused: bytes that a prefetch read from outside the page cache, but the next fetch did not request.
        fetch_seconds: seconds that fetches waited.
        seconds: seconds from the end of the previous fetch, of any layer, to the end of each fetch.
    """

    fetches: int = 0
    bytes_requested: int = 0
    bytes_loaded: int = 0
    bytes_missing: int = 0
    bytes_unused: int = 0
    fetch_seconds: float = 0.0
    seconds: float = 0.0

    def since(self, before: StoreStats) -> StoreStats:
        """Returns the difference to an earlier copy of these counters."""
        return StoreStats(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    def count(self, stride: int, requested: int, loaded: Mapping[int, int], waited: float, seconds: float) -> None:
        """Adds a fetch to the counters.

        Args:
            requested: number of requested records of ``stride`` bytes. loaded: for each record that was not in the
                store's memory, its missing bytes.
        """
        self.fetches += 1
        self.bytes_requested += stride * requested
        self.bytes_loaded += stride * len(loaded)
        self.bytes_missing += sum(loaded.values())
        self.fetch_seconds += waited
        self.seconds += seconds
