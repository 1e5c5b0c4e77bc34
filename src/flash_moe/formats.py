"""How a matrix of weights is stored: as plain floats, or quantised.

This file is arithmetic only: it knows no file and no array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
ITEM_SIZE = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
FLOATS = ("BF16", "F16", "F32")


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

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size}


@dataclass(frozen=True)
class ProjectionFormat:
    """How one projection is stored: quantised (``dtype`` is that of scales and biases) or plain floats of ``dtype``."""

    dtype: str
    quantization: Quantization | None = None

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype} | (self.quantization.to_json() if self.quantization else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProjectionFormat:
        """Rebuilds a format written by :meth:`to_json`; KeyError or TypeError where it is none."""
        rest = {key: value for key, value in data.items() if key != "dtype"}
        return cls(data["dtype"], Quantization(**rest) if rest else None)


def part_shapes(rows: int, columns: int, fmt: ProjectionFormat) -> dict[str, tuple[str, tuple[int, int]]]:
    """Type and shape of each stored part of a [rows, columns] projection, by name.

    Raises:
        CheckpointError: the row cannot be split into whole groups, or its packed bits into whole words.
    """
    q = fmt.quantization
    if fmt.dtype not in FLOATS:
        raise CheckpointError(f"weights or scales of type {fmt.dtype}, expected BF16, F16 or F32")
    if q is None:
        return {"weight": (fmt.dtype, (rows, columns))}
    if columns % q.group_size or columns * q.bits % 32:
        raise CheckpointError(
            f"rows of {columns} weights cannot be quantised in groups of {q.group_size} at {q.bits} bits; "
            "choose a group size that divides the row"
        )
    grouped = (rows, columns // q.group_size)
    return {
        "weight": ("U32", (rows, columns * q.bits // 32)),
        "scales": (fmt.dtype, grouped),
        "biases": (fmt.dtype, grouped),
    }
