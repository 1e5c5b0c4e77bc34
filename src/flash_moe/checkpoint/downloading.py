"""The progress of a download, from the sizes of the files that the hub's client writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from ..progress import Callback, Progress

_INTERVAL = 0.5  # seconds between two looks


class Watch:
    """Within its context, a thread looks at the files twice a second and reports the bytes of all together.

    What the callback raises ends the download, at its next sign of life, and is raised when the context ends.

    Args:
        blobs: the folder that files are written to; an unfinished one's name begins like the finished one's.
        sizes: name and size of each file.
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
        """Raises what the callback raised, to end the download."""
        if self._error is not None:
            raise self._error

    def _look(self) -> None:
        assert self._report is not None
        try:
            while not self._over.is_set():
                self._report(self._progress())
                self._over.wait(_INTERVAL)
            self._report(self._progress())
        except BaseException as error:  # raised again where the download was asked for
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
            except FileNotFoundError:  # not begun, or renamed since it was listed
                continue
        return max(sizes)
