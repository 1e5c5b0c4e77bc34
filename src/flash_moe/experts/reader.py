"""Reads records from their extents: large requests side by side, every byte or an error that says which are missing."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.records import Extent, RecordTable
from ..closing import UntilClosed
from ..errors import CheckpointError, ExpertReadError
from .banks import Targets
from .mapped_file import MappedFile, UnmappableError
from .read_queue import ReadQueue, Reads, Request

IN_FLIGHT = 8  # requests that wait for the disk at a time; 4 to 9 saturate an SSD
REQUEST = 1 << 20  # bytes of one request: smaller ones cost more to queue; of larger ones fewer can be cancelled
COPY = 2 << 20  # bytes of one out of the page cache, which are more where cores are few: each costs a little
SAMPLE = 64 << 10  # bytes of a record of which the page cache is asked: to ask of all costs a fifth of copying them
INLINE = 256 << 10  # below this many bytes, handing the work to threads costs more than it saves
_random = random.Random()  # the global one is the user's


@dataclass(frozen=True)
class Location:
    """A record and the open files that hold its parts."""

    layer: int
    expert: int
    parts: tuple[tuple[MappedFile, Extent], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(extent.nbytes for _, extent in self.parts)

    def evict(self) -> None:
        """Asks the system to drop the record from the page cache, see :meth:`MappedFile.evict`."""
        for file, extent in self.parts:
            file.evict(extent.offset, extent.nbytes)

    def missing_bytes(self) -> int:
        """Returns bytes of the record that are not in the page cache."""
        return sum(file.missing_bytes(extent.offset, extent.nbytes) for file, extent in self.parts)

    def missing_share(self) -> float:
        """Returns the share of the record that is not in the page cache, by a sample: its pages come and go together."""
        start = SAMPLE * int(_random.random() * -(-self.nbytes // SAMPLE))
        parts = iter(self.parts)
        file, extent = next(parts)
        while start >= extent.nbytes:
            start -= extent.nbytes
            file, extent = next(parts)
        nbytes = min(SAMPLE, extent.nbytes - start)
        return file.missing_bytes(extent.offset + start, nbytes) / nbytes

    def read_into(self, target: np.ndarray | Sequence[np.ndarray], file: MappedFile, offset: int) -> None:
        """As :meth:`MappedFile.read_into`, with an :class:`ExpertReadError` that names file, layer and expert.

        What was read is what the file held when its state was noted: a change before the end of the read is an error.
        """
        try:
            file.read_into(target, offset)
        except (OSError, EOFError) as error:
            raise ExpertReadError(str(file.path), self.layer, self.expert, str(error)) from error
        self.check(file)

    def check(self, file: MappedFile) -> None:
        """Raises ExpertReadError where a file of the record has changed."""
        try:
            reason = file.change()
        except OSError as error:
            reason = str(error)
        if reason is not None:
            raise ExpertReadError(str(file.path), self.layer, self.expert, reason)


class RecordReader:
    """Random access to the records of a checkpoint."""

    _files = UntilClosed[dict[Path, MappedFile]]()

    def __init__(self, table: RecordTable) -> None:
        self.table = table
        self._files = {}
        self._cores = os.cpu_count() or 1
        self._queue = ReadQueue(IN_FLIGHT, self._cores)

    def close(self) -> None:
        """Cancels reads that have not begun, and has threads that wait for reads raise :class:`ModelClosedError`.

        A file is closed when nothing refers to it any more: at once, or when the reads under way have ended.
        """
        del self._files
        self._queue.close()

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        """Has threads that wait for reads ask ``cancelled``, see :class:`ReadQueue`."""
        self._queue.cancelled = cancelled

    def file(self, path: Path) -> MappedFile:
        """Returns the open file of that path.

        Raises:
            CheckpointError: it cannot be opened, or was changed since its header was read.
            ModelClosedError: after :meth:`close`.
        """
        try:
            return self._file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _file(self, path: Path) -> MappedFile:
        files = self._files
        if (file := files.get(path)) is None:
            file = files[path] = MappedFile(path, self.table.states[path])
        return file

    def require_mappable(self) -> None:
        """Opens all files.

        Raises:
            UnmappableError: one of them cannot be mapped.
            CheckpointError: see :meth:`file`.
        """
        for path in self.table.files:
            if (reason := self.file(path).unmappable) is not None:
                raise UnmappableError(f"{path} cannot be mapped ({reason}), as expert_io='mapped' needs; use 'slots'")

    def evict(self, *, flush: bool = False) -> None:
        """Asks the system to drop all files from the page cache, see :meth:`MappedFile.evict`."""
        for path in self.table.files:
            self.file(path).evict(flush=flush)

    def cached_bytes(self) -> int:
        """Returns bytes of all files that are in the page cache."""
        return sum(self.file(path).cached_bytes() for path in self.table.files)

    def locate(self, layer: int, expert: int) -> Location:
        """Where a record lies, after checking that none of its files has changed.

        Raises:
            ExpertReadError: a file cannot be opened, or was changed since its header was read.
        """
        parts = []
        for extent in self.table.extents(layer, expert):
            try:
                parts.append((self._file(extent.file), extent))
            except OSError as error:
                raise ExpertReadError(str(extent.file), layer, expert, str(error)) from error
        location = Location(layer, expert, tuple(parts))
        for file, _ in parts:
            location.check(file)
        return location

    def read(self, location: Location, target: Targets) -> Reads:
        """Starts filling ``target`` with a record, see :meth:`run`.

        Nobody may free or reuse its memory before the reads have ended.

        Args:
            target: a buffer [>= stride] uint8, or one for each part of the record, in order.
        """
        requests: list[Request] = []
        missing = location.missing_share()
        request = REQUEST if missing else max(COPY, -(-location.nbytes // self._cores))
        for file, extent in location.parts:
            for start in range(0, extent.nbytes, request):
                stop = min(start + request, extent.nbytes)
                buffers = _buffers(target, extent.at + start, extent.at + stop)
                requests.append(_Fill(location, file, extent.offset + start, buffers, missing))
        return self.run(requests, location.nbytes)

    def read_all(self, layer: int, experts: Sequence[int], targets: Sequence[Targets]) -> None:
        """Fills each target with the record of an expert, and waits for it.

        Raises:
            ExpertReadError: the first failure, once no read is under way any more.
        """
        begun: list[Reads] = []
        try:
            for expert, target in zip(experts, targets, strict=True):
                begun.append(self.read(self.locate(layer, expert), target))
        finally:
            self.copy()
            for reads in begun:
                reads.wait()
        for reads in begun:
            reads.finish()

    def run(self, requests: Sequence[Request], nbytes: int) -> Reads:
        """Starts requests of ``nbytes`` bytes on the reading threads; a few are read before it returns.

        Those that only copy out of the page cache begin with the next :meth:`copy`.
        """
        return self._queue.add(requests) if nbytes > INLINE else self._queue.do(requests)

    def copy(self) -> None:
        """Begins what :meth:`run` left, see :meth:`ReadQueue.copy`."""
        self._queue.copy()


def _buffers(targets: Targets, start: int, stop: int) -> list[np.ndarray]:
    """Returns the memory of the bytes from ``start`` to ``stop`` of a record; what lies between targets goes nowhere."""
    if isinstance(targets, np.ndarray):
        return [targets[start:stop]]
    found, at = [], start
    for target in targets:
        first, last = max(target.at, start), min(target.at + target.buffer.nbytes, stop)
        if first >= last:
            continue
        if first > at:
            found.append(np.empty(first - at, np.uint8))
        found.append(target.buffer[first - target.at : last - target.at])
        at = last
    if at < stop:
        found.append(np.empty(stop - at, np.uint8))
    return found


class _Fill:
    """A part of a record on its way into memory."""

    __slots__ = ("_buffers", "_file", "_location", "_offset", "missing")

    def __init__(
        self, location: Location, file: MappedFile, offset: int, buffers: Sequence[np.ndarray], missing: float
    ) -> None:
        self._location, self._file, self._offset, self._buffers = location, file, offset, buffers
        self.missing = round(missing * sum(buffer.nbytes for buffer in buffers))

    def read(self) -> None:
        self._location.read_into(self._buffers, self._file, self._offset)
