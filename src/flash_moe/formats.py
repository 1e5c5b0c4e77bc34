"""Storage formats of weight matrices: plain floats, or quantised.

This module only computes sizes: it uses no files and no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits and group size of each mode except affine
SOURCE_MODES = {"fp8": (8, 1)}  # formats of other libraries, which `flash-moe convert` converts
FP8_BLOCK = 128  # rows and columns of a block that shares a scale
GLOBAL_SCALE = 448.0 * 6.0  # the largest e4m3 times the largest e2m1; a global scale of this value has no effect
ITEM_SIZE = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Quantization:
    """A quantisation of weights, in one of MLX's modes.

    In affine mode, w = scale · q + bias, with one scale and bias per ``group_size`` weights of a row. In the other
    modes, q is a small float, e2m1 (mxfp4, nvfp4) or e4m3 (mxfp8), and there is no bias. The scale is one byte: e4m3
    for nvfp4, otherwise e8m0.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode != "affine":
            if not isinstance(self.mode, str) or self.mode not in MODES | SOURCE_MODES:
                raise CheckpointError(f"quantised in mode {self.mode!r}, expected one of affine, {', '.join(MODES)}")
            bits, group_size = (MODES | SOURCE_MODES)[self.mode]
            if (self.bits, self.group_size) != (bits, group_size):
                raise CheckpointError(
                    f"quantised in mode {self.mode} to {self.bits!r} bits in groups of {self.group_size!r}, expected "
                    f"{bits} bits in groups of {group_size}; restore the original config.json"
                )
            return
        if type(self.bits) is not int or self.bits not in QUANTIZED_BITS:
            raise CheckpointError(f"quantised to {self.bits!r} bits, expected one of {QUANTIZED_BITS}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise CheckpointError(f"quantised in groups of {self.group_size!r}, expected one of {GROUP_SIZES}")

    @classmethod
    def of_mode(cls, mode: str) -> Quantization:
        """Returns the quantisation of a mode other than affine; each has only one."""
        return cls(*MODES.get(mode, (0, 0)), mode)

    @property
    def is_affine(self) -> bool:
        return self.mode == "affine"

    @property
    def is_foreign(self) -> bool:
        """Whether the mode belongs to another library; MLX does not support it."""
        return self.mode in SOURCE_MODES

    def __str__(self) -> str:
        return f"{self.bits}-bit, groups of {self.group_size}" if self.is_affine else self.mode

    def to_json(self) -> dict[str, Any]:
        """Returns the arguments of MLX's quantised operations. For affine it contains no mode, as in config.json."""
        return {"bits": self.bits, "group_size": self.group_size} | ({} if self.is_affine else {"mode": self.mode})


@dataclass(frozen=True)
class ProjectionFormat:
    """The storage of one projection.

    Attributes:
        dtype: dtype of the weights, or of the scales if the weights are quantised. Scales are U8 in all modes except
            affine.
        quantization: None for plain floats.
        global_scale: whether all weights share one more scale, a float32 (nvfp4 only).
    """

    dtype: str
    quantization: Quantization | None = None
    global_scale: bool = False

    @classmethod
    def quantized(cls, quantization: Quantization, dtype: str) -> ProjectionFormat:
        """Returns a quantised format. Affine scales have ``dtype`` if that is a float, and BF16 otherwise."""
        if not quantization.is_affine:
            return cls("U8", quantization)
        return cls(dtype if dtype in FLOATS else "BF16", quantization)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"dtype": self.dtype} | (self.quantization.to_json() if self.quantization else {})
        return found | ({"global_scale": True} if self.global_scale else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProjectionFormat:
        """Rebuilds a format written by :meth:`to_json`. Malformed data raises KeyError or TypeError."""
        rest = {key: value for key, value in data.items() if key not in ("dtype", "global_scale")}
        return cls(data["dtype"], Quantization(**rest) if rest else None, data.get("global_scale", False) is True)


def part_shapes(rows: int, columns: int, fmt: ProjectionFormat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the dtype and shape of each stored part of a [rows, columns] projection, by name.

    Raises:
        CheckpointError: a row does not divide into whole groups, or its packed bits into whole words.
    """
    q = fmt.quantization
    expected = FLOATS if q is None or q.is_affine else ("U8",)
    if fmt.dtype not in expected:
        raise CheckpointError(
            f"weights or scales of type {fmt.dtype}, expected {'U8' if expected == ('U8',) else 'BF16, F16 or F32'}"
        )
    if q is None:
        return {"weight": (fmt.dtype, (rows, columns))}
    if columns % q.group_size or columns * q.bits % 32:
        raise CheckpointError(
            f"rows of {columns} weights cannot be quantised in groups of {q.group_size} at {q.bits} bits; "
            "choose a group size that divides the row"
        )
    scales = (fmt.dtype, (rows, columns // q.group_size))
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("U32", (rows, columns * q.bits // 32)),
        "scales": scales,
    }
    if q.is_affine:
        parts["biases"] = scales
    if fmt.global_scale:
        if q.mode != "nvfp4":
            raise CheckpointError(f"a global scale in mode {q.mode}, expected one in mode nvfp4 only; convert again")
        parts["global_scale"] = ("F32", (1,))
    return parts
