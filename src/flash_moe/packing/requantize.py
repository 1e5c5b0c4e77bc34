"""From a record of one layout to a record of another: parts that agree are copied, the others quantised anew."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..ops.experts import dequantized
from ..record import PROJECTIONS, Part, ProjectionFormat, Quantization, RecordLayout


def target_formats(
    source: RecordLayout, wanted: Quantization | None, floats: Quantization
) -> dict[str, ProjectionFormat]:
    """How each projection is to be stored: as ``wanted``, or as it is where that is None.

    Args:
        floats: for plain floats, which cannot stay: a packed model's experts are quantised.
    """
    formats = {}
    for name in PROJECTIONS:
        fmt = source.formats[name]
        formats[name] = ProjectionFormat(fmt.dtype, wanted or fmt.quantization or floats)
    return formats


def changed_projections(source: RecordLayout, target: RecordLayout) -> list[str]:
    """Names of the projections that have to be quantised, or quantised again."""
    return [name for name in PROJECTIONS if source.formats[name] != target.formats[name]]


def requantize(records: mx.array, source: RecordLayout, target: RecordLayout) -> np.ndarray:
    """Rewrites records from one layout to another.

    Args:
        records: [N, words] uint32 records of layout ``source``.

    Returns:
        [N, stride] uint8 records of layout ``target``.
    """
    stored = np.array(records, copy=False).view(np.uint8)
    if not changed_projections(source, target):
        return stored[:, : target.stride]
    out = np.zeros((len(stored), target.stride), np.uint8)
    old, new = dict(source.parts()), dict(target.parts())
    for name in PROJECTIONS:
        if source.formats[name] == target.formats[name]:
            values: Mapping[str, np.ndarray] = {
                part: stored[:, old[part].offset : old[part].offset + old[part].nbytes]
                for part in old
                if part.startswith(name)
            }
        else:
            values = _quantized(records, source, target, name)
        for part, value in values.items():
            _place(out, new[part], value)
    return out


def _quantized(records: mx.array, source: RecordLayout, target: RecordLayout, name: str) -> dict[str, np.ndarray]:
    fmt = target.formats[name]
    assert fmt.quantization is not None
    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[fmt.dtype]
    weights = dequantized(records, getattr(source, name), dtype)
    parts = mx.quantize(weights, group_size=fmt.quantization.group_size, bits=fmt.quantization.bits)
    names = ("weight", "scales", "biases")
    return {f"{name}.{kind}": as_bytes(array) for kind, array in zip(names, parts, strict=True)}


def as_bytes(array: mx.array) -> np.ndarray:
    """The bytes of an array, [rows of the first axis, bytes]."""
    words = mx.contiguous(array).view(mx.uint32 if array.itemsize == 4 else mx.uint16)
    mx.eval(words)
    return np.array(words, copy=False).reshape(len(words), -1).view(np.uint8)


def _place(out: np.ndarray, part: Part, value: np.ndarray) -> None:
    out[:, part.offset : part.offset + part.nbytes] = value
