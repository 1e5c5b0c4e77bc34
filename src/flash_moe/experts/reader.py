"""Reads records from their extents with large parallel requests. A read is complete, or raises an error."""

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
from .host_memory import ALIGNMENT
from .mapped_file import MappedFile, UnmappableError
from .read_queue import ReadQueue, Reads, Request

IN_FLIGHT = 8  # requests that wait for the disk at the same time; 4 to 9 saturate an SSD
REQUEST = 1 << 20  # bytes of a request; smaller ones cost more to queue, and larger ones are cancelled less often
COPY = 2 << 20  # most bytes of a copy from the page cache; more on few cores, because each request has a cost
COPIES = 8  # copies at the same time; more saturate the memory and cost handovers of the GIL
SAMPLE = 64 << 10  # bytes of a record to query in the page cache; a query of all takes a fifth of the time of a copy
INLINE = 256 << 10  # below this many bytes, a handover to threads takes longer than it saves
_random = random.Random()  # not the global generator, which belongs to the user


@dataclass(frozen=True)
class Location:
    """A record and the open files with its parts."""

    layer: int
    expert: int
    parts: tuple[tuple[MappedFile, Extent], ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(extent.nbytes for _, extent in self.parts)

    def evict(self) -> None:
        """Asks the system to drop the record from the page cache, see :meth:`MappedFile.evict`."""
        for file, extent in self.parts:
            file.evict(extent.offset, extent.nbytes)

    def missing_bytes(self) -> int:
        """Returns the bytes of the record that are missing from the page cache."""
        return sum(file.missing_bytes(extent.offset, extent.nbytes) for file, extent in self.parts)

    def missing_share(self) -> float:
        """Returns the missing share of the record, from a sample of its pages, which usually have the same state."""
        start = SAMPLE * int(_random.random() * -(-self.nbytes // SAMPLE))
        parts = iter(self.parts)
        file, extent = next(parts)
        while start >= extent.nbytes:
            start -= extent.nbytes
            file, extent = next(parts)
        nbytes = min(SAMPLE, extent.nbytes - start)
        return file.missing_bytes(extent.offset + start, nbytes) / nbytes

    def read_into(self, target: np.ndarray | Sequence[np.ndarray], file: MappedFile, offset: int) -> None:
        """Reads as :meth:`MappedFile.read_into` does. An :class:`ExpertReadError` names file, layer and expert.

        If the file changed before the end of the read, this is an error too.
        """
        try:
            file.read_into(target, offset)
        except (OSError, EOFError) as error:
            raise ExpertReadError(str(file.path), self.layer, self.expert, str(error)) from error
        self.check(file)

    def check(self, file: MappedFile) -> None:
        """Raises ExpertReadError if a file of the record has changed."""
        try:
            reason = file.change()
        except OSError as error:
            reason = str(error)
        if reason is not None:
            raise ExpertReadError(str(file.path), self.layer, self.expert, reason)


class RecordReader:
    """Reads any record of a checkpoint."""

    _files = UntilClosed[dict[Path, MappedFile]]()

    def __init__(self, table: RecordTable) -> None:
        self.table = table
        self._files = {}
        self._cores = os.cpu_count() or 1
        self._queue = ReadQueue(IN_FLIGHT, min(self._cores, COPIES))

    def close(self) -> None:
        """Cancels reads that have not begun. Threads that wait for reads raise :class:`ModelClosedError`.

        Files are closed as soon as no running read uses them.
        """
        del self._files
        self._queue.close()

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        """Sets the function that waiting threads call to check for cancellation, see :class:`ReadQueue`."""
        self._queue.cancelled = cancelled

    def file(self, path: Path) -> MappedFile:
        """Returns the open file for a path.

        Raises:
            CheckpointError: the file cannot be opened, or has changed since its header was read.
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
        """Opens all files and checks that they can be mapped.

        Raises:
            UnmappableError: a file cannot be mapped.
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
        """Returns the bytes of all files that are in the page cache."""
        return sum(self.file(path).cached_bytes() for path in self.table.files)

    def locate(self, layer: int, expert: int) -> Location:
        """Returns the location of a record, after checking that none of its files has changed.

        Raises:
            ExpertReadError: a file cannot be opened, or has changed since its header was read.
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
        """Starts to read a record into ``target``, see :meth:`run`.

        The memory of ``target`` must not be freed or reused before the reads have ended.

        Args:
            target: a buffer [>= stride] uint8, or one buffer per part of the record, in order.
        """
        requests: list[Request] = []
        missing = location.missing_share()
        request = REQUEST
        if not missing:  # equal copies
            count = min(self._cores, -(-location.nbytes // COPY))
            request = ALIGNMENT * -(-location.nbytes // (count * ALIGNMENT))
        for file, extent in location.parts:
            for start in range(0, extent.nbytes, request):
                stop = min(start + request, extent.nbytes)
                buffers = _buffers(target, extent.at + start, extent.at + stop)
                requests.append(_Fill(location, file, extent.offset + start, buffers, missing))
        return self.run(requests, location.nbytes)

    def read_all(self, layer: int, experts: Sequence[int], targets: Sequence[Targets]) -> None:
        """Reads the record of each expert into its target, and waits for all of them.

        Raises:
            ExpertReadError: the first error, after all reads have ended.
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
        """Starts requests of ``nbytes`` bytes in total on worker threads. Small ones are processed before it returns.

        Requests that only copy from the page cache begin with the next call of :meth:`copy`.
        """
        return self._queue.add(requests) if nbytes > INLINE else self._queue.do(requests)

    def copy(self) -> None:
        """Starts the copies that :meth:`run` queued, see :meth:`ReadQueue.copy`."""
        self._queue.copy()


def _buffers(targets: Targets, start: int, stop: int) -> list[np.ndarray]:
    """Returns the memory for the bytes ``start`` to ``stop`` of a record. Bytes between targets are discarded."""
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
    """A request that reads a part of a record into memory."""

    __slots__ = ("_buffers", "_file", "_location", "_offset", "missing")

    def __init__(
        self, location: Location, file: MappedFile, offset: int, buffers: Sequence[np.ndarray], missing: float
    ) -> None:
        self._location, self._file, self._offset, self._buffers = location, file, offset, buffers
        self.missing = round(missing * sum(buffer.nbytes for buffer in buffers))

    def read(self) -> None:
        self._location.read_into(self._buffers, self._file, self._offset)
