"""What tests of the expert stores share: checkpoints with known records, and a disk that can fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_moe.checkpoint.records import RecordTable
from flash_moe.experts.store import Records
from flash_moe.models import open_model


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the bytes that each of its records must have."""

    folder: Path
    records: dict[tuple[int, int], bytes]

    @property
    def table(self) -> RecordTable:
        return open_model(self.folder).records()


@dataclass
class Disk:
    """What ``os.preadv`` does: ``fault(path, offset)`` may raise, or return how many bytes to deliver at most."""

    fault: Callable[[str, int], int | None] | None = None
    calls: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes delivered

    def fail(self, file: Path, offset: int, nbytes: int) -> None:
        """Reads that begin in this range of a file fail with EIO until :meth:`heal`."""

        def fault(path: str, start: int) -> None:
            if path == str(file) and offset <= start < offset + nbytes:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.fault = fault

    def heal(self) -> None:
        self.fault = None


def record_bytes(records: Records) -> list[bytes]:
    """The content of each record, now."""
    return [row.tobytes() for row in np.array(records.stacked())]


def use(records: Records) -> mx.array:
    """An output that depends on every byte of the records and is not evaluated yet."""
    output = records.stacked() ^ 0
    records.used_by(output)
    return output


def output_bytes(output: mx.array) -> list[bytes]:
    return [row.tobytes() for row in np.array(output)]
