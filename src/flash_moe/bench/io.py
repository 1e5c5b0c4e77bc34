"""Measures reads of experts: plain reads by request size and threads, and fetches of the library's stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.records import RecordTable
from ..errors import CheckpointError
from ..experts.opening import fetch_capacity
from ..models import open_checkpoint
from .fetches import FetchSpeed, fetch_speed
from .raw_reads import THREADS, RawSpeed, open_files, raw_speed

SIZES = (256 << 10, 1 << 20, 4 << 20)  # request sizes in bytes, in addition to that of a record
_RAW_SHARE = 0.7  # share of the time for plain reads; the rest is for the stores


@dataclass(frozen=True)
class IOReport:
    """All speeds in bytes per second.

    Attributes:
        path: the folder or file that was read.
        record_bytes: bytes of the largest record; None for a file.
        nbytes: total bytes of the files.
        raw: speeds of plain reads by request size and threads.
        fetches: speeds of the stores; empty for a file.
    """

    path: str
    record_bytes: int | None
    nbytes: int
    raw: tuple[RawSpeed, ...]
    fetches: tuple[FetchSpeed, ...]

    @property
    def really_cold(self) -> bool:
        """Whether at most a hundredth of the cold bytes were in the page cache."""
        return all(speed.missing > 0.99 for speed in self.raw) and all(f.cold is not None for f in self.fetches)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON data."""
        return dataclasses.asdict(self) | {"really_cold": self.really_cold}


def bench_io(
    path: Path, experts_per_token: int | None, seconds: float, progress: Callable[[int, int], None] | None = None
) -> IOReport:
    """Measures reads of a checkpoint's experts, or of any file.

    Args:
        path: a folder with a checkpoint of any form, or a file, for which only plain reads are measured.
        experts_per_token: number of records in a fetch, as for a token; None means the model's own K. Fetches of the
            size in prefill are measured too.
        seconds: approximate duration of the measurement, without opening the files.
        progress: function that is called as ``progress(done, total)`` after each measurement.

    Raises:
        ConfigError, CheckpointError: the folder contains no checkpoint, or the file is too short.
        ExpertReadError: a record cannot be read.
        ArgumentError: K is not from 1 to the model's own.
    """
    table, k = (None, 0) if path.is_file() else _experts(path, experts_per_token)
    paths = [path] if table is None else table.files
    sizes = sorted({*SIZES, *(() if table is None else (table.max_stride,))})
    files = open_files(paths)
    try:
        longest = max(file.size for file in files)
        cells = [(size, threads) for size in sizes if size <= longest or size == sizes[0] for threads in THREADS]
        stores = [] if table is None else _fetches(table, k)
        total, done = len(cells) + len(stores), 0
        share = _RAW_SHARE if stores else 1.0
        raw, fetches = [], []
        for size, threads in cells:
            raw.append(raw_speed(files, threads, size, share * seconds / len(cells)))
            done += 1
            if progress is not None:
                progress(done, total)
    finally:
        for file in files:
            file.close()
    del file, files  # pages in a mapping cannot be dropped
    for kind, records in stores:
        assert table is not None
        fetches.append(fetch_speed(table, kind, records, (1 - share) * seconds / len(stores)))
        done += 1
        if progress is not None:
            progress(done, total)
    nbytes = sum(path.stat().st_size for path in paths)
    return IOReport(str(path), None if table is None else table.max_stride, nbytes, tuple(raw), tuple(fetches))


def _experts(folder: Path, wanted: int | None) -> tuple[RecordTable, int]:
    """Returns the records of a checkpoint, and K."""
    checkpoint = open_checkpoint(folder)
    table = checkpoint.records()
    if not table.layouts:
        raise CheckpointError(f"{folder} has no routed experts; expected a Mixture of Experts")
    return table, checkpoint.experts_for(wanted)


def _fetches(table: RecordTable, k: int) -> list[tuple[Any, int]]:
    """Returns the stores and the records per fetch: those of a token and those of prefill."""
    counts = sorted({min(k, table.num_experts), fetch_capacity(table, k)})
    return [(kind, count) for kind in ("mapped", "slots") for count in counts]
