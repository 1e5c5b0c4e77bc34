"""Reports the progress of a download, from the sizes of the files that the hub's client writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from ..progress import Callback, Progress

_INTERVAL = 0.5  # seconds between two checks


class Watch:
    """A context manager. Inside it, a thread checks the files twice a second and reports their total bytes.

    If the callback raises an error, the download ends at its next report, and the error is raised at the end of the
    context.

    Args:
        blobs: the folder of the files. The name of an unfinished file begins with that of the finished one.
        sizes: size of each file, by name.
        note: see :class:`~flash_moe.progress.Progress`.
    """

    def __init__(self, blobs: Path, sizes: Sequence[tuple[str, int]], note: str, report: Callback | None) -> None:
        self._blobs, self._sizes, self._note, self._report = blobs, sizes, note, report
        self._total = sum(size for _, size in sizes)
        self._over = Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._look, name="flash-moe-download", daemon=True)

    def __enter__(self) -> Watch:
        if self._report is not None and self._sizes:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error from None

    def check(self) -> None:
        """Raises the error of the callback, if any, to end the download."""
        if self._error is not None:
            raise self._error

    def _look(self) -> None:
        assert self._report is not None
        try:
            while not self._over.is_set():
                self._report(self._progress())
                self._over.wait(_INTERVAL)
            self._report(self._progress())
        except BaseException as error:  # raised again in the thread of the download
            self._error = error

    def _progress(self) -> Progress:
        done = sum(min(size, self._written(blob)) for blob, size in self._sizes)
        return Progress("download", done, self._total, "bytes", self._note)

    def _written(self, blob: str) -> int:
        found = [self._blobs / blob, *self._blobs.glob(f"{blob}*.incomplete")]
        sizes = [0]
        for path in found:
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # the file has not begun, or was renamed since it was listed
                continue
        return max(sizes)
