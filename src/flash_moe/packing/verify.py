"""Reads every byte of a packed checkpoint and compares it with the checksums."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import INDEX
from ..checkpoint.packed import Manifest, checksum
from ..errors import CheckpointError, ExpertReadError
from ..experts.host_memory import read_buffer
from ..experts.reader import RecordReader
from ..models import open_checkpoint
from ..progress import Callback, Progress, ProgressOption, following
from .descriptions import file_checksum


@dataclass(frozen=True)
class Verification:
    """The result for ``records`` records and ``files`` files. Without checksums, it means only that all can be read."""

    records: int
    files: int
    nbytes: int
    checksums: bool


def verify(folder: str | os.PathLike[str], progress: ProgressOption = True) -> Verification:
    """Verifies all records and resident files of a checkpoint.

    A packed checkpoint is compared with its checksums. Other checkpoints have no checksums, so every expert is read.
    Headers and config.json must be those of a model that can be loaded.

    Args:
        progress: whether to report the progress; see :meth:`flash_moe.Model.load`.

    Raises:
        ExpertReadError: a record cannot be read, or differs from its checksum. It names the first such record.
        CheckpointError: another part of the checkpoint is missing or damaged.
    """
    with following(progress) as report:
        return _verify(Path(folder), report)


def _verify(folder: Path, report: Callback | None) -> Verification:
    checkpoint = open_checkpoint(folder)
    manifest = Manifest.load(folder)
    table = checkpoint.records(None)
    sizes = {file: file.stat().st_size for file in checkpoint.metadata} if manifest else {}
    total, done = table.nbytes + sum(sizes.values()), 0
    for file, size in sizes.items():
        assert manifest is not None
        if file.name not in manifest.resident:
            raise CheckpointError(f"{file} is not in the manifest; the folder was changed after packing: convert again")
        if file_checksum(file) != manifest.resident[file.name]:
            raise CheckpointError(f"{file} differs from its checksum; copy or convert it again")
        done += size
        if report is not None:
            report(Progress("verify", done, total, "bytes"))
    if manifest and (lost := sorted({*manifest.resident} - {file.name for file in sizes})):
        raise CheckpointError(f"{INDEX} does not name {lost[0]}, which the manifest does; copy or convert it again")
    checkpoint.check_resident(table.layouts)
    reader = RecordReader(table)
    try:
        for layer, layout in table.layouts.items():
            record = read_buffer(layout.stride)
            for place, expert in enumerate(table.experts(layer)):
                reader.read_all(layer, (expert,), (record,))
                if manifest and checksum(record.data) != manifest.layers[layer].checksums[place]:
                    bad = table.extents(layer, expert)[0]
                    reason = (
                        f"its {bad.nbytes} bytes at {bad.offset} differ from their checksum; copy or convert it again"
                    )
                    raise ExpertReadError(str(bad.file), layer, expert, reason)
                done += layout.stride
                if report is not None:
                    report(Progress("verify", done, total, "bytes"))
    finally:
        reader.close()
    return Verification(table.count, len(sizes), total, manifest is not None)
