"""The plan of a conversion: the opened source and the target layouts, for every family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ..checkpoint.integers import IntegerPart
from ..checkpoint.packed import MANIFEST
from ..checkpoint.records import RecordTable
from ..errors import ArgumentError
from ..formats import ProjectionFormat, Quantization
from ..models import AdaptedFiles, ModelFiles, is_adapted, open_model
from ..record import PROJECTIONS, Part, RecordLayout
from ..share import Share
from .adapted import AdaptedRecords, AdaptedResident
from .requantize import Rounding, adopt, changed_projections, stored_part
from .resident_files import ResidentFiles

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Resident: TypeAlias = ResidentFiles | AdaptedResident
_MOST_LOSS = 0.2  # of the weights, as RMS; nvfp4 usually loses 0.1
_DOWN = ("down_proj", "fc2")  # names of the linear layer that projects back to the hidden size


@dataclass(frozen=True)
class Widths:
    """The requested storage of weights. The arguments are those of :func:`.convert.convert`.

    Raises:
        ArgumentError: the mode is unknown, or bits are given for a mode with fixed bits.
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

    def floats(self, quantized: bool) -> Quantization | None:
        """Returns the quantisation of floats outside the experts; None in a quantised checkpoint, where they stay
        floats.
        """
        if self.mode not in (None, "affine"):
            return Quantization.of_mode(self.mode)
        if self.bits is None and self.mode is None and quantized:
            return None
        return Quantization(max(self.bits or 4, 4), self.group_size)

    def layouts(self, layouts: Mapping[int, RecordLayout], quantized: bool) -> dict[int, RecordLayout]:
        """Returns the target layouts for the layouts of a checkpoint, by layer.

        Raises:
            CheckpointError: the bits or group size are invalid, or do not fit the rows.
        """
        floats = self.floats(quantized)
        experts = self.bits if self.expert_bits is None else self.expert_bits
        down = experts if self.down_bits is None else self.down_bits
        found = {}
        for i, old in layouts.items():
            formats = {}
            for name, fmt in old.formats.items():
                if fmt.quantization is not None and fmt.quantization.is_foreign:
                    fmt = ProjectionFormat("BF16")
                bits = down if name in _DOWN else experts
                wanted = floats
                if self.mode in (None, "affine"):
                    wanted = None if bits is None else Quantization(bits, self.group_size)
                new = wanted or fmt.quantization or floats
                same = new is None or new == fmt.quantization
                formats[name] = fmt if new is None or same else ProjectionFormat.quantized(new, fmt.dtype)
            found[i] = old.stored_as(formats)
        return found


def identity(checkpoint: ModelFiles | AdaptedFiles, table: RecordTable) -> dict[str, Any]:
    """Returns data that identifies the source. If it changes, a partial conversion cannot be continued."""
    files = {checkpoint.folder / "config.json", *checkpoint.folder.glob(MANIFEST), *checkpoint.metadata}
    files |= {extent.file for layer in table.layouts for extent in table.extents(layer, table.experts(layer)[0])}
    states = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    return {"source": str(checkpoint.folder.resolve()), "files": states}


def warnings(source: Source) -> list[str]:
    """Returns warnings for the user about the result."""
    name, loss = max(source.losses.items(), key=lambda item: item[1], default=("", 0.0))
    if loss > _MOST_LOSS:
        return [
            f"nvfp4 changes the weights of {name} by {loss:.0%} (RMS): they are too small for its scales; use mode mxfp4"
        ]
    for i, layout in source.records.layouts.items():
        for name in changed_projections(layout, source.target[i]):
            old, new = layout.formats[name].quantization, source.target[i].formats[name].quantization
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
    """Returns a digest that identifies calibration texts."""
    tokens = json.dumps([[int(token) for token in sequence] for sequence in sequences])
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Source:
    """The source of a conversion, and its target layouts.

    Attributes:
        table: the records in the form of the files, which ``records`` converts.
        target: the target layouts.
        resident: all other weights. Each can be read only once.
        reopened: function that opens them again from the current files.
        losses: as for :func:`.rounding.nearest`.
    """

    checkpoint: ModelFiles | AdaptedFiles
    table: RecordTable
    records: OwnRecords | AdaptedRecords
    target: dict[int, RecordLayout]
    resident: Resident
    reopened: Callable[[], Resident]
    losses: dict[str, float]

    def units(self, layer: int) -> Iterator[tuple[str, list[Part], list[int]]]:
        """Yields groups of parts that must be converted together: the linear layer, the parts, and the indices of their
        stored parts.
        """
        layout = self.records.layouts[layer]
        changed = changed_projections(layout, self.target[layer])
        for linear in layout.linears:
            mine = [part for part in layout.parts if part.linear == linear]
            whole = linear in changed or self.records.is_whole(layer, linear)
            for parts in [mine] if whole else [[part] for part in mine]:
                yield linear, parts, sorted({self.records.stored_part(layer, part) for part in parts})


@dataclass(frozen=True)
class OwnRecords:
    """The records of a model that runs on our own network; counterpart of :class:`.adapted.AdaptedRecords`."""

    checkpoint: ModelFiles
    layouts: Mapping[int, RecordLayout]

    def prepare(self, layer: int, records: np.ndarray, linears: Sequence[str] = PROJECTIONS) -> np.ndarray:
        """Converts records [N, stride] uint8 from the form in the files to MLX's form, in place."""
        adopt(self.checkpoint, layer, self.layouts[layer], records, linears)
        return records

    def stored_part(self, layer: int, part: Part) -> int:
        """Returns the index of the stored part that a part is made of."""
        return self.layouts[layer].parts.index(part)

    def is_whole(self, layer: int, linear: str) -> bool:
        """Returns whether all parts of a linear layer must be converted together."""
        scaled = self.layouts[layer].linears[linear].global_scale is not None
        return scaled or isinstance(stored_part(self.checkpoint, layer, linear, "weight"), IntegerPart)


def open_source(folder: Path, widths: Widths, rounding: Rounding, share: Share) -> Source:
    """Opens a checkpoint for conversion. It reads only headers.

    Args:
        share: the share of the experts to write.

    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be read, or cannot be stored as requested.
    """
    return _of_mlx_lm(folder, widths, share) if is_adapted(folder) else _of_ours(folder, widths, rounding, share)


def _of_ours(folder: Path, widths: Widths, rounding: Rounding, share: Share) -> Source:
    checkpoint = open_model(folder, adopt=True)
    table, quantized = checkpoint.records(share), checkpoint.quantization.default is not None
    losses: dict[str, float] = {}

    def reopened() -> ResidentFiles:
        return ResidentFiles(open_model(folder, adopt=True), widths.floats(quantized), rounding, losses)

    target, resident = widths.layouts(table.layouts, quantized), reopened()
    resident.check(target)
    return Source(checkpoint, table, OwnRecords(checkpoint, table.layouts), target, resident, reopened, losses)


def _of_mlx_lm(folder: Path, widths: Widths, share: Share) -> Source:
    checkpoint = AdaptedFiles.open(folder)
    records, quantized = AdaptedRecords(checkpoint), checkpoint.quantization is not None
    target = widths.layouts(records.layouts, quantized)

    def resident(files: AdaptedFiles) -> AdaptedResident:
        return AdaptedResident(files, widths.floats(quantized), target)

    return Source(
        checkpoint,
        checkpoint.records(share),
        records,
        target,
        resident(checkpoint),
        lambda: resident(checkpoint.reopened()),
        {},
    )
