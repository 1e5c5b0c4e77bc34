"""Reads records from their extents: large requests side by side, every byte or an error that says which are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.records import Extent, RecordTable
from ..errors import ExpertReadError
from .files import PAGE, MappedFile

THREADS = 8  # requests in flight; 4 to 9 saturate an SSD
REQUEST = 2 << 20  # bytes of one request: smaller ones cost handing over, larger ones end a fetch with fewer under way
INLINE = 256 << 10  # below this many bytes, handing the work to threads costs more than it saves


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
        """Bytes of the record that are not in the page cache."""
        return sum(
            min(int(np.count_nonzero(file.absent(extent.offset, extent.nbytes))) * PAGE, extent.nbytes)
            for file, extent in self.parts
        )

    def error(self, file: MappedFile, reason: Exception) -> ExpertReadError:
        """The error that says that this record could not be read from ``file``."""
        return ExpertReadError(str(file.path), self.layer, self.expert, str(reason))


class RecordReader:
    """Random access to the records of a checkpoint."""

    def __init__(self, table: RecordTable) -> None:
        self.table = table
        self._files: dict[Path, MappedFile] = {}
        self._closed = False
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="flash-moe-read")

    def close(self) -> None:
        """Waits for reads under way and closes all files."""
        self._closed = True
        self._pool.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, path: Path) -> MappedFile:
        """The open file of that path."""
        if self._closed:
            raise ValueError("the model was closed; load it again")
        if (file := self._files.get(path)) is None:
            file = self._files[path] = MappedFile(path)
        return file

    def evict(self, *, flush: bool = False) -> None:
        """Asks the system to drop all files from the page cache, see :meth:`MappedFile.evict`."""
        for path in self.table.files:
            self.file(path).evict(flush=flush)

    def cached_bytes(self) -> int:
        """Bytes of all files that are in the page cache."""
        return sum(self.file(path).cached_bytes() for path in self.table.files)

    def locate(self, layer: int, expert: int) -> Location:
        """Where a record lies, after checking that none of its files has changed.

        Raises:
            ExpertReadError: a file cannot be opened or was changed since.
        """
        parts = []
        for extent in self.table.extents(layer, expert):
            try:
                file = self.file(extent.file)
                reason = file.change()
            except (OSError, ValueError) as error:
                reason = str(error)
            if reason is not None:
                raise ExpertReadError(str(extent.file), layer, expert, reason)
            parts.append((file, extent))
        return Location(layer, expert, tuple(parts))

    def read(self, location: Location, buffer: np.ndarray) -> list[Future[None]]:
        """Starts filling ``buffer`` ([>= stride] uint8) with a record; a small one is there on return.

        Returns:
            What :func:`finish` waits for. Nobody may free or reuse the buffer before.
        """
        tasks: list[Callable[[], None]] = []
        total = 0
        for file, extent in location.parts:
            total += extent.nbytes
            for start in range(0, extent.nbytes, REQUEST):
                stop = min(start + REQUEST, extent.nbytes)
                target = buffer[extent.at + start : extent.at + stop]
                tasks.append(_Read(file, extent.offset + start, target, location))
        return self.run(tasks, inline=total <= INLINE)

    def read_all(self, layer: int, experts: Sequence[int], buffers: Sequence[np.ndarray]) -> None:
        """Fills each buffer with the record of an expert, and waits for it.

        Raises:
            ExpertReadError: the first failure, once no read is under way any more.
        """
        futures: list[Future[None]] = []
        try:
            for expert, buffer in zip(experts, buffers, strict=True):
                futures += self.read(self.locate(layer, expert), buffer)
        finally:
            wait(futures)
        finish(futures)

    def run(self, tasks: Sequence[Callable[[], None]], *, inline: bool = False) -> list[Future[None]]:
        """Runs the tasks on the reading threads, or at once in this one."""
        if not inline:
            return [self._pool.submit(task) for task in tasks]
        for task in tasks:
            task()
        return []


def finish(futures: Sequence[Future[None]]) -> None:
    """Waits until every read has ended, then raises the first failure, if any."""
    if futures:
        wait(futures)
    for future in futures:
        future.result()


class _Read:
    """One request; its failure names file, layer and expert."""

    __slots__ = ("file", "location", "offset", "target")

    def __init__(self, file: MappedFile, offset: int, target: np.ndarray, location: Location) -> None:
        self.file, self.offset, self.target, self.location = file, offset, target, location

    def __call__(self) -> None:
        try:
            self.file.read_into(self.target, self.offset)
        except (OSError, EOFError) as error:
            raise self.location.error(self.file, error) from error
