"""Reads records from their extents: large requests side by side, every byte or an error that says which are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from ..checkpoint.records import Extent, RecordTable
from ..errors import ExpertReadError
from .files import PAGE, MappedFile

THREADS = 8  # requests in flight; 4 to 9 saturate an SSD at this request size
REQUEST = 2 << 20  # bytes of one request
INLINE = 256 << 10  # below this many bytes, handing the work to threads costs more than it saves


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

    def extents(self, layer: int, expert: int) -> list[tuple[MappedFile, Extent]]:
        """The extents of a record with their open files, after checking that no file has changed.

        Raises:
            ExpertReadError: a file cannot be opened or was changed since.
        """
        found = []
        for extent in self.table.extents(layer, expert):
            try:
                file = self.file(extent.file)
                reason = file.change()
            except (OSError, ValueError) as error:
                reason = str(error)
            if reason is not None:
                raise ExpertReadError(str(extent.file), layer, expert, reason)
            found.append((file, extent))
        return found

    def missing_bytes(self, layer: int, experts: Iterable[int]) -> int:
        """Bytes of these records that are not in the page cache."""
        total = 0
        for expert in experts:
            for file, extent in self.extents(layer, expert):
                total += min(int(file.absent(extent.offset, extent.nbytes).sum()) * PAGE, extent.nbytes)
        return total

    def read(self, layer: int, experts: Sequence[int], buffers: Sequence[np.ndarray]) -> list[Future[None]]:
        """Starts filling each buffer ([>= stride] uint8) with a record; small reads are done on return.

        Returns:
            What :func:`finish` waits for. Nobody may free or reuse the buffers before.
        """
        tasks: list[Callable[[], None]] = []
        total = 0
        for expert, buffer in zip(experts, buffers, strict=True):
            for file, extent in self.extents(layer, expert):
                total += extent.nbytes
                for start in range(0, extent.nbytes, REQUEST):
                    stop = min(start + REQUEST, extent.nbytes)
                    target = buffer[extent.at + start : extent.at + stop]
                    tasks.append(_Read(file, extent.offset + start, target, layer, expert))
        return self.run(tasks, inline=total <= INLINE)

    def run(self, tasks: Sequence[Callable[[], None]], *, inline: bool = False) -> list[Future[None]]:
        """Runs the tasks on the reading threads, or at once in this one."""
        if not inline:
            return [self._pool.submit(task) for task in tasks]
        for task in tasks:
            task()
        return []


def finish(futures: Sequence[Future[None]]) -> None:
    """Waits until every read has ended, then raises the first failure, if any."""
    wait(futures)
    for future in futures:
        future.result()


class _Read:
    """One request; its failure names file, layer and expert."""

    def __init__(self, file: MappedFile, offset: int, target: np.ndarray, layer: int, expert: int) -> None:
        self.file, self.offset, self.target, self.layer, self.expert = file, offset, target, layer, expert

    def __call__(self) -> None:
        try:
            self.file.read_into(self.target, self.offset)
        except (OSError, EOFError) as error:
            raise ExpertReadError(str(self.file.path), self.layer, self.expert, str(error)) from error
