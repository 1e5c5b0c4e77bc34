"""The record: everything one expert of one layer needs, as one flat run of bytes.

A record holds nine parts in a fixed order: weight, scales and biases of gate_proj, up_proj and down_proj
(three parts, the weights, where a projection is not quantised). Each part starts at a multiple of 64 bytes, and the
stride from one record to the next is a multiple of 16 KiB, the page size of Apple silicon, so that a record can be
mapped on its own. This file is arithmetic only: it knows no file and no array.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

PART_ALIGNMENT = 64
RECORD_ALIGNMENT = 16 * 1024
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
ITEM_SIZE = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2}
FLOATS = ("BF16", "F16", "F32")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Quantization:
    """Affine quantisation: w = scale · q + bias, one scale and bias per ``group_size`` weights of a row."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in QUANTIZED_BITS:
            raise CheckpointError(f"quantised to {self.bits!r} bits, expected one of {QUANTIZED_BITS}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise CheckpointError(f"quantised in groups of {self.group_size!r}, expected one of {GROUP_SIZES}")


@dataclass(frozen=True)
class Part:
    """One array inside a record: ``shape`` elements of safetensors type ``dtype``, ``offset`` bytes from its start."""

    dtype: str
    shape: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class ProjectionFormat:
    """How one projection is stored: quantised (``dtype`` is that of scales and biases) or plain floats of ``dtype``."""

    dtype: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class ProjectionLayout:
    """The parts of one projection; ``scales`` and ``biases`` are None where it is not quantised."""

    weight: Part
    scales: Part | None
    biases: Part | None
    quantization: Quantization | None

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(p for p in (self.weight, self.scales, self.biases) if p is not None)


@dataclass(frozen=True)
class RecordLayout:
    """Where each part of a record lies.

    Attributes:
        gate_proj, up_proj, down_proj: layouts of the three projections ([I, H], [I, H] and [H, I]).
        stride: bytes from one record to the next.
    """

    hidden_size: int
    intermediate_size: int
    formats: Mapping[str, ProjectionFormat]
    gate_proj: ProjectionLayout
    up_proj: ProjectionLayout
    down_proj: ProjectionLayout
    stride: int

    @classmethod
    def build(cls, hidden_size: int, intermediate_size: int, formats: Mapping[str, ProjectionFormat]) -> RecordLayout:
        """Lays the parts of ``formats`` (keys: gate_proj, up_proj, down_proj) out one after the other.

        Raises:
            CheckpointError: a group size does not divide the row length.
        """
        offset, layouts = 0, []
        for name in PROJECTIONS:
            rows, columns = (
                (hidden_size, intermediate_size) if name == "down_proj" else (intermediate_size, hidden_size)
            )
            parts: list[Part] = []
            for dtype, shape in part_shapes(rows, columns, formats[name]):
                parts.append(Part(dtype, shape, offset))
                offset = round_up(offset + parts[-1].nbytes, PART_ALIGNMENT)
            scales, biases = parts[1:] if len(parts) == 3 else (None, None)
            layouts.append(ProjectionLayout(parts[0], scales, biases, formats[name].quantization))
        gate, up, down = layouts
        return cls(hidden_size, intermediate_size, dict(formats), gate, up, down, round_up(offset, RECORD_ALIGNMENT))

    @property
    def bits_per_weight(self) -> float:
        """Bits of a record's parts, scales and biases included, over its number of weights; padding does not count."""
        return 8 * sum(part.nbytes for _, part in self.parts()) / (3 * self.hidden_size * self.intermediate_size)

    @property
    def projections(self) -> tuple[tuple[str, ProjectionLayout], ...]:
        return tuple((name, getattr(self, name)) for name in PROJECTIONS)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yields ``("gate_proj.weight", part)`` and so on, in the order they lie."""
        for name, projection in self.projections:
            for kind, part in zip(("weight", "scales", "biases"), projection.parts, strict=False):
                yield f"{name}.{kind}", part

    def to_json(self) -> dict[str, Any]:
        """A plain description from which :meth:`from_json` rebuilds the same layout."""
        formats = {}
        for name in PROJECTIONS:
            fmt = self.formats[name]
            q = fmt.quantization
            formats[name] = {"dtype": fmt.dtype} | ({"bits": q.bits, "group_size": q.group_size} if q else {})
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "stride": self.stride,
            "projections": formats,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordLayout:
        """Rebuilds a layout written by :meth:`to_json`.

        Raises:
            CheckpointError: a key is missing or the stated stride is not the one this layout has.
        """
        try:
            formats = {
                name: ProjectionFormat(
                    fmt["dtype"], Quantization(fmt["bits"], fmt["group_size"]) if "bits" in fmt else None
                )
                for name, fmt in data["projections"].items()
            }
            layout = cls.build(data["hidden_size"], data["intermediate_size"], formats)
            stride = data["stride"]
            if any(type(n) is not int or n < 1 for n in (layout.hidden_size, layout.intermediate_size, stride)):
                raise TypeError("sizes are integers of at least 1")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the record layout {data!r} is malformed ({error!r}); convert the model again"
            ) from None
        if layout.stride != stride:
            raise CheckpointError(f"records are {stride} bytes apart, this layout needs {layout.stride}; convert again")
        return layout


def part_shapes(rows: int, columns: int, fmt: ProjectionFormat) -> list[tuple[str, tuple[int, int]]]:
    """Type and shape of each stored part of a [rows, columns] projection.

    Raises:
        CheckpointError: the row cannot be split into whole groups, or its packed bits into whole words.
    """
    q = fmt.quantization
    if fmt.dtype not in FLOATS:
        raise CheckpointError(f"weights or scales of type {fmt.dtype}, expected BF16, F16 or F32")
    if q is None:
        return [(fmt.dtype, (rows, columns))]
    if columns % q.group_size or columns * q.bits % 32:
        raise CheckpointError(
            f"rows of {columns} weights cannot be quantised in groups of {q.group_size} at {q.bits} bits; "
            "choose a group size that divides the row"
        )
    grouped = (rows, columns // q.group_size)
    return [("U32", (rows, columns * q.bits // 32)), (fmt.dtype, grouped), (fmt.dtype, grouped)]
