"""What a conversion is to make, and from what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.packed import MANIFEST
from ..checkpoint.records import RecordTable
from ..formats import ProjectionFormat, Quantization
from ..models import ModelFiles
from ..record import PROJECTIONS, RecordLayout
from .requantize import changed_projections


def target_layouts(
    table: RecordTable, expert_bits: int | None, down_bits: int | None, group_size: int
) -> dict[int, RecordLayout]:
    """The layouts to write: of None bits are quantised weights as they are, and floats 4-bit.

    Raises:
        CheckpointError: bits or group size are none that there are, or do not fit the rows.
    """
    bits = dict.fromkeys(PROJECTIONS, expert_bits)
    if down_bits is not None:
        bits["down_proj"] = down_bits
    wanted = {name: None if n is None else Quantization(n, group_size) for name, n in bits.items()}
    floats = Quantization(4, group_size)
    layouts = {}
    for i, old in table.layouts.items():
        formats = {
            name: ProjectionFormat(fmt.dtype, wanted[name] or fmt.quantization or floats)
            for name, fmt in old.formats.items()
        }
        layouts[i] = RecordLayout.build(old.hidden_size, old.intermediate_size, formats)
    return layouts


def identity(checkpoint: ModelFiles, table: RecordTable) -> dict[str, Any]:
    """What identifies the source; when any of it changes, a half-done conversion is of no use."""
    files = {checkpoint.folder / "config.json", *checkpoint.folder.glob(MANIFEST), *checkpoint.metadata}
    files |= {extent.file for layer in table.layouts for extent in table.extents(layer, 0)}
    states = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return {"source": str(checkpoint.folder.resolve()), "files": states}


def warnings(table: RecordTable, target: Mapping[int, RecordLayout]) -> list[str]:
    """What people should know about the result."""
    for i, layout in table.layouts.items():
        for name in changed_projections(layout, target[i]):
            old, new = layout.formats[name].quantization, target[i].formats[name].quantization
            if old is not None and new is not None:
                return [
                    f"the experts were requantised from {old.bits} to {new.bits} bits: rounding twice loses far more than "
                    "quantising the original weights once; convert from the bf16 checkpoint if you can"
                ]
    return []


def fingerprint(sequences: Sequence[Sequence[int]]) -> str:
    """What identifies calibration texts."""
    tokens = json.dumps([[int(token) for token in sequence] for sequence in sequences])
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()
