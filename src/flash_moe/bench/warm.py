"""Reads the experts of a checkpoint into the page cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..experts.files import MappedFile
from ..experts.read_memory import read_buffer
from ..models import open_checkpoint

_REQUEST = 8 << 20  # bytes


def warm(folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Reads every file that holds experts from its beginning to its end.

    Args:
        progress: called as ``progress(done, total)`` in files.
    """
    paths, buffer = open_checkpoint(folder).records().files, read_buffer(_REQUEST)
    for number, path in enumerate(paths, start=1):
        file = MappedFile(path)
        try:
            for start in range(0, file.size, _REQUEST):
                file.read_into(buffer[: min(_REQUEST, file.size - start)], start)
        finally:
            file.close()
        if progress is not None:
            progress(number, len(paths))
