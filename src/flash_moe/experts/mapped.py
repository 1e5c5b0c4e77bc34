"""Records used where the operating system maps them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress

import mlx.core as mx
import numpy as np

from ..errors import ExpertReadError
from .files import PAGE, MappedFile
from .read_memory import read_buffer
from .reader import INLINE, Location, RecordReader, finish
from .store import ExpertStore

_REQUEST = 1 << 20  # bytes of one request; what it reads is for the page cache, and the buffer stays in the processor's


class MappedStore(ExpertStore):
    """Hands out mapped pages: without a copy on Metal, copied elsewhere.

    Pages that the page cache lacks are first read with large parallel requests, since single page faults are several
    times slower, and since a read that fails is an exception where a fault that fails ends the process.
    """

    def __init__(self, reader: RecordReader, capacity: int) -> None:
        super().__init__(reader.table.layouts, capacity)
        self._reader = reader
        self._scratch = threading.local()
        self._warming: dict[int, dict[int, list[Future[None]]]] = {}  # by layer and expert

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[mx.array]:
        locations = [self._reader.locate(layer, expert) for expert in experts]
        warming = self._warming.pop(layer, {})  # what nobody asks for now is not waited for, either
        ready = []
        for location in locations:
            started = warming.get(location.expert)
            ready.append(self._warm(location) if started is None else started)
        return self._find(layer, locations, ready)

    def _find(
        self, layer: int, locations: Sequence[Location], ready: Sequence[list[Future[None]]]
    ) -> Iterator[mx.array]:
        words = self.layouts[layer].stride // 4
        for location, futures in zip(locations, ready, strict=True):
            finish(futures)
            yield _array(location, words)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        warming = self._warming.setdefault(layer, {})
        for expert in experts:
            if expert not in warming:
                with suppress(ExpertReadError):  # the fetch that needs the record tries again and reports it
                    warming[expert] = self._warm(self._reader.locate(layer, expert))

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        warming = self._warming.get(layer, {})
        return [e in warming or self._reader.locate(layer, e).missing_bytes() == 0 for e in experts]

    def _evict(self, flush: bool) -> None:
        for by_expert in self._warming.values():
            for futures in by_expert.values():
                wait(futures)
        self._warming.clear()
        self._reader.evict(flush=flush)

    def cached_bytes(self) -> int:
        return self._reader.cached_bytes()

    def close(self) -> None:
        self._reader.close()

    def _warm(self, location: Location) -> list[Future[None]]:
        """Starts reading the absent pages of a record into the page cache."""
        tasks: list[Callable[[], None]] = []
        missing = 0
        for file, extent in location.parts:
            absent = file.absent(extent.offset, extent.nbytes)
            if not (count := int(np.count_nonzero(absent))):
                continue
            missing += min(count * PAGE, extent.nbytes)
            first, end = extent.offset // PAGE * PAGE, extent.offset + extent.nbytes
            for start, stop in _requests(absent):
                tasks.append(self._touch(file, first + start * PAGE, min(first + stop * PAGE, end), location))
        self._count_brought(location.layer, location.expert, missing)
        return self._reader.run(tasks, inline=missing <= INLINE)

    def _touch(self, file: MappedFile, start: int, stop: int, location: Location) -> Callable[[], None]:
        def task() -> None:
            if not hasattr(self._scratch, "buffer"):
                self._scratch.buffer = read_buffer(_REQUEST)
            try:
                file.read_into(self._scratch.buffer[: stop - start], start)
            except (OSError, EOFError) as error:
                raise location.error(file, error) from error

        return task


def _requests(absent: np.ndarray) -> list[tuple[int, int]]:
    """Page ranges, of at most _REQUEST bytes each, that cover all absent pages."""
    pages = np.flatnonzero(absent)
    ranges = []
    while pages.size:
        first = int(pages[0])
        inside = pages < first + _REQUEST // PAGE
        ranges.append((first, int(pages[inside][-1]) + 1))
        pages = pages[~inside]
    return ranges


def _array(location: Location, words: int) -> mx.array:
    """A record over its mapped pages; where it lies in pieces, they are put together first."""
    if len(location.parts) == 1:
        ((file, extent),) = location.parts
        return mx.asarray(file.pages[extent.offset : extent.offset + extent.nbytes].view(np.uint32))
    record = np.zeros(4 * words, np.uint8)
    for file, extent in location.parts:
        record[extent.at : extent.at + extent.nbytes] = file.pages[extent.offset : extent.offset + extent.nbytes]
    return mx.array(record.view(np.uint32))
