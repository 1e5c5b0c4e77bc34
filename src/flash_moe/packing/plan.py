"""What a conversion is to make, and from what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..checkpoint.packed import MANIFEST
from ..checkpoint.records import RecordTable
from ..errors import ArgumentError
from ..formats import ProjectionFormat, Quantization
from ..models import ModelFiles
from ..record import PROJECTIONS, RecordLayout
from .requantize import changed_projections

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]


@dataclass(frozen=True)
class Widths:
    """How weights are to be stored; arguments are those of :func:`.convert.convert`.

    Raises:
        ArgumentError: the mode is unknown, or bits are given with one that has its own.
    """

    bits: int | None
    expert_bits: int | None
    down_bits: int | None
    group_size: int
    mode: Mode | None

    def __post_init__(self) -> None:
        if self.mode not in (None, *get_args(Mode)):
            raise ArgumentError(f"mode is {self.mode!r}, expected None or one of {', '.join(get_args(Mode))}")
        given = [n for n in (self.bits, self.expert_bits, self.down_bits) if n is not None]
        if self.mode not in (None, "affine") and given:
            raise ArgumentError(f"mode {self.mode!r} has bits of its own, found bits {given[0]}; leave bits out")

    def floats(self, checkpoint: ModelFiles) -> Quantization | None:
        """What becomes of floats outside the experts; None in a quantised checkpoint, which holds them on purpose."""
        if self.mode not in (None, "affine"):
            return Quantization.of_mode(self.mode)
        if self.bits is None and self.mode is None and checkpoint.quantization.default is not None:
            return None
        return Quantization(max(self.bits or 4, 4), self.group_size)

    def layouts(self, checkpoint: ModelFiles, table: RecordTable) -> dict[int, RecordLayout]:
        """The layouts to write, by layer.

        Raises:
            CheckpointError: bits or group size are none that there are, or do not fit the rows.
        """
        floats = self.floats(checkpoint)
        wanted = dict.fromkeys(PROJECTIONS, floats)
        if self.mode in (None, "affine"):
            experts = self.bits if self.expert_bits is None else self.expert_bits
            down = experts if self.down_bits is None else self.down_bits
            bits = {"gate_proj": experts, "up_proj": experts, "down_proj": down}
            wanted = {name: None if n is None else Quantization(n, self.group_size) for name, n in bits.items()}
        layouts = {}
        for i, old in table.layouts.items():
            formats = {}
            for name, fmt in old.formats.items():
                if fmt.quantization is not None and fmt.quantization.is_foreign:
                    fmt = ProjectionFormat("BF16")
                new = wanted[name] or fmt.quantization or floats
                same = new is None or new == fmt.quantization
                formats[name] = fmt if new is None or same else ProjectionFormat.quantized(new, fmt.dtype)
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
            if old is not None and new is not None and not old.is_foreign:
                here, there = (f"{q.bits} bits" if q.is_affine else q.mode for q in (old, new))
                if old.is_affine and new.is_affine:
                    here = str(old.bits)
                return [
                    f"the experts were requantised from {here} to {there}: rounding twice loses far more than "
                    "quantising the original weights once; convert from the bf16 checkpoint if you can"
                ]
    return []


def fingerprint(sequences: Sequence[Sequence[int]]) -> str:
    """What identifies calibration texts."""
    tokens = json.dumps([[int(token) for token in sequence] for sequence in sequences])
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()
