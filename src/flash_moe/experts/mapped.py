"""The mapped store: uses records in place in the mapped pages of files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np

from ..closing import UntilClosed, take
from ..errors import Cancelled, ExpertReadError
from .host_memory import read_buffer
from .mapped_file import PAGE, MappedFile
from .read_queue import Reads, Request
from .reader import REQUEST, Location, RecordReader
from .store import ExpertStore


class MappedStore(ExpertStore):
    """Returns records from mapped pages: in place on Metal, copied elsewhere.

    Missing pages are first read with large parallel requests, for two reasons. Single page faults are several times
    slower. And a failed read raises an exception, while a failed page fault ends the process.

    Raises:
        UnmappableError: a file is on a file system that cannot map files.
    """

    _reader = UntilClosed[RecordReader]()

    def __init__(self, reader: RecordReader, capacity: int) -> None:
        super().__init__(reader.table.layouts, capacity)
        reader.require_mappable()
        self._reader = reader
        self._scratch = threading.local()  # a small buffer per thread; reads only fill the page cache
        self._warming: dict[int, dict[int, Reads]] = {}  # running reads by layer and expert

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[np.ndarray]:
        locations = [self._reader.locate(layer, expert) for expert in experts]
        warming = self._warming.pop(layer, {})
        begun = {e: self._warm(location) for e, location in zip(experts, locations, strict=True) if e not in warming}
        return self._find(layer, locations, warming, begun)

    def _find(
        self, layer: int, locations: Sequence[Location], warming: Mapping[int, Reads], begun: Mapping[int, Reads]
    ) -> Iterator[np.ndarray]:
        stride = self.layouts[layer].stride
        for location in locations:
            if (reads := begun.get(location.expert)) is not None:
                reads.finish()
            else:
                try:
                    warming[location.expert].finish()
                except (ExpertReadError, Cancelled):
                    self._check()
                    self._warm(location).finish()  # an earlier call began the read, perhaps while the disk failed
            yield _bytes(location, stride)
        for location in locations:  # checks the file after the copy; pages that are used later can still change
            for file, _ in location.parts:
                location.check(file)

    def _lost(self, layer: int, expert: int) -> None:
        self._warming.get(layer, {}).pop(expert, None)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        warming = self._warming.setdefault(layer, {})
        for expert in experts:
            if expert not in warming:
                with suppress(ExpertReadError):  # the fetch that needs the record tries again and reports the error
                    warming[expert] = self._warm(self._reader.locate(layer, expert))

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        warming = self._warming.get(layer, {})
        return [e in warming or self._reader.locate(layer, e).missing_bytes() == 0 for e in experts]

    def _evict(self, flush: bool) -> None:
        for by_expert in self._warming.values():
            for reads in by_expert.values():
                reads.stop()
        self._warming.clear()
        self._reader.evict(flush=flush)

    def cached_bytes(self) -> int:
        return self._reader.cached_bytes()

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        super().stop_if(cancelled)
        self._reader.stop_if(cancelled)

    def close(self) -> None:
        if (reader := take(self, "_reader")) is not None:
            reader.close()

    def _warm(self, location: Location) -> Reads:
        """Starts reading the missing pages of a record into the page cache."""
        requests: list[Request] = []
        missing = 0
        for file, extent in location.parts:
            uncached = file.missing_pages(extent.offset, extent.nbytes)
            first, end = extent.offset // PAGE * PAGE, extent.offset + extent.nbytes
            for start, stop in _requests(uncached):
                pages = range(first + start * PAGE, min(first + stop * PAGE, end))
                of_record = pages.stop - max(pages.start, extent.offset)
                nbytes = min(PAGE * int(np.count_nonzero(uncached[start:stop])), of_record)
                missing += nbytes
                requests.append(_Touch(self._scratch, location, file, pages, nbytes))
        reads = self._reader.run(requests, missing)
        self._note(location.layer, location.expert, reads)
        return reads


class _Touch:
    """A request that reads a part of a record into the page cache."""

    def __init__(
        self, scratch: threading.local, location: Location, file: MappedFile, where: range, missing: int
    ) -> None:
        self._scratch, self._location, self._file = scratch, location, file
        self._where, self.missing = where, missing

    def read(self) -> None:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = read_buffer(REQUEST)
        self._location.read_into(self._scratch.buffer[: len(self._where)], self._file, self._where.start)


def _requests(uncached: np.ndarray) -> list[tuple[int, int]]:
    """Returns ranges of pages, at most REQUEST bytes each, that cover all missing pages."""
    pages = np.flatnonzero(uncached)
    ranges = []
    while pages.size:
        first = int(pages[0])
        inside = pages < first + REQUEST // PAGE
        ranges.append((first, int(pages[inside][-1]) + 1))
        pages = pages[~inside]
    return ranges


def _bytes(location: Location, stride: int) -> np.ndarray:
    """Returns the mapped pages of a record; several extents are copied together."""
    if len(location.parts) == 1:
        ((file, extent),) = location.parts
        return file.pages[extent.offset : extent.offset + extent.nbytes]
    record = np.zeros(stride, np.uint8)
    for file, extent in location.parts:
        record[extent.at : extent.at + extent.nbytes] = file.pages[extent.offset : extent.offset + extent.nbytes]
    return record
