"""Converts records between layouts: unchanged parts are copied, others are quantised again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from ..checkpoint.foreign import mlx_global_scale
from ..checkpoint.integers import IntegerPart
from ..checkpoint.names import ExpertTensor
from ..checkpoint.safetensors import TensorInfo
from ..dtypes import DTYPES
from ..formats import ProjectionFormat, Quantization
from ..models import ModelFiles
from ..ops.experts import dequantized
from ..ops.foreign_weights import affine_of
from ..record import PROJECTIONS, RecordLayout
from .affine import Affine, packed, stored
from .rounding import nearest, search

Rounding = Literal["nearest", "search"]
Parts = Mapping[str, np.ndarray]  # the bytes of the parts of a record, by name such as "gate_proj.weight"


def changed_projections(source: RecordLayout, target: RecordLayout) -> list[str]:
    """Returns the names of the projections that must be quantised or requantised."""
    return [name for name in source.linears if source.formats[name] != target.formats[name]]


def requantize(
    records: mx.array, source: RecordLayout, target: RecordLayout, rounding: Rounding, losses: dict[str, float]
) -> np.ndarray:
    """Converts records from one layout to another, rounding each weight separately.

    Args:
        records: [N, words] uint32 records of layout ``source``.
        rounding: ``"nearest"`` as in MLX, or ``"search"`` for the scales and biases with the smallest error.
        losses: as for :func:`.rounding.nearest`.

    Returns:
        [N, stride] uint8 records of layout ``target``.
    """
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(records.shape[0])]
    for name in changed_projections(source, target):
        for record, found in zip(parts, rewritten(records, source, target, name, rounding, losses), strict=True):
            record |= found
    return assembled(records, source, target, parts)


def rewritten(
    records: mx.array,
    source: RecordLayout,
    target: RecordLayout,
    name: str,
    rounding: Rounding,
    losses: dict[str, float],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the requantised parts of one projection for each record of [N, words]."""
    quantization = target.formats[name].quantization
    plain = rounding == "nearest" or (quantization is not None and not quantization.is_affine)
    if plain:
        return _nearest(records, source, target, name, losses)
    return _searched(records, source, target, name)


def assembled(records: mx.array, source: RecordLayout, target: RecordLayout, parts: Sequence[Parts]) -> np.ndarray:
    """Builds records of layout ``target``, [N, stride] uint8, from new parts; all other parts are copied."""
    old, kept = np.array(records, copy=False).view(np.uint8), {part.key: part for part in source.parts}
    if source == target:
        return old
    out = np.zeros((len(old), target.stride), np.uint8)
    for record, stored_bytes, new in zip(out, old, parts, strict=True):
        for part in target.parts:
            value = new.get(part.key)
            if value is None:
                value = stored_bytes[kept[part.key].offset : kept[part.key].offset + kept[part.key].nbytes]
            record[part.offset : part.offset + part.nbytes] = value
    return out


def adopt(
    checkpoint: ModelFiles,
    layer: int,
    layout: RecordLayout,
    records: np.ndarray,
    linears: Sequence[str] = PROJECTIONS,
) -> None:
    """Converts records [N, stride] uint8 from the form of another library to that of MLX, in place."""
    for name in linears:
        linear = layout.linears[name]
        if (
            linear.global_scale is not None
            and (info := stored_part(checkpoint, layer, name, "global_scale")) is not None
        ):
            values = records[:, linear.global_scale.offset :][:, : linear.global_scale.nbytes]
            scales = mlx_global_scale(info.name, values.copy().view(np.float32))
            values[:] = np.asarray(scales, np.float32).view(np.uint8)
        info = stored_part(checkpoint, layer, name, "weight")
        if isinstance(info, IntegerPart):
            parts = linear.parts
            weight, scales, zeros = (
                mx.array(np.ascontiguousarray(records[:, part.offset :][:, : part.nbytes])).view(DTYPES[dtype])
                for part, dtype in zip(parts, ("U32", parts[1].dtype, "U32"), strict=True)
            )
            arrays = affine_of(info.form.order, info.form.bits, info.form.zero, linear.rows, weight, scales, zeros)
            for part, array in zip(parts, arrays, strict=True):
                records[:, part.offset : part.offset + part.nbytes] = as_bytes(array)


def stored_part(checkpoint: ModelFiles, layer: int, name: str, part: str) -> TensorInfo | None:
    """Returns the tensor of a part of a projection, for all experts or for the first."""
    found = (checkpoint.experts.get(ExpertTensor(layer, expert, name, part)) for expert in (None, 0))
    return next(filter(None, found), None)


def affine_parts(name: str, affine: Affine, fmt: ProjectionFormat) -> dict[str, np.ndarray]:
    """Returns the stored parts of a projection [rows, groups, size]."""
    assert fmt.quantization is not None
    words = packed(affine.codes.reshape(len(affine.codes), -1), fmt.quantization.bits)
    return {
        f"{name}.weight": words.view(np.uint8).reshape(-1),
        f"{name}.scales": stored(affine.scales, fmt.dtype).reshape(-1),
        f"{name}.biases": stored(affine.biases, fmt.dtype).reshape(-1),
    }


def _nearest(
    records: mx.array, source: RecordLayout, target: RecordLayout, name: str, losses: dict[str, float]
) -> Iterator[dict[str, np.ndarray]]:
    fmt = target.formats[name]
    assert fmt.quantization is not None
    old = source.formats[name]
    stored = fmt.dtype if fmt.quantization.is_affine or old.quantization is not None else old.dtype
    dtype = {"F32": mx.float32, "F16": mx.float16}.get(stored, mx.bfloat16)
    weights = dequantized(records, source.linears[name], dtype)
    kinds = [as_bytes(array) for array in nearest(weights, fmt.quantization, f"{name} of an expert", losses)]
    for values in zip(*kinds, strict=True):
        yield {f"{name}.{kind}": value for kind, value in zip(("weight", "scales", "biases"), values, strict=False)}


def _searched(
    records: mx.array, source: RecordLayout, target: RecordLayout, name: str
) -> Iterator[dict[str, np.ndarray]]:
    fmt = target.formats[name]
    assert fmt.quantization is not None
    for record in records:
        yield affine_parts(name, searched(as_floats(record[None], source, name), fmt.quantization, fmt.dtype), fmt)


def searched(weights: np.ndarray, quantization: Quantization, dtype: str) -> Affine:
    """Quantises a matrix [rows, columns] with :func:`search`; the result is [rows, groups, size]."""
    rows, size = len(weights), quantization.group_size
    found = search(weights.reshape(-1, size), quantization.bits, dtype)
    return Affine(found.codes.reshape(rows, -1, size), found.scales.reshape(rows, -1), found.biases.reshape(rows, -1))


def as_floats(record: mx.array, source: RecordLayout, name: str) -> np.ndarray:
    """Returns a projection of a single record [1, words] as float32, [out, in]."""
    weights = dequantized(record, source.linears[name], mx.float32)[0]
    mx.eval(weights)
    return np.array(weights)


def as_bytes(array: mx.array) -> np.ndarray:
    """Returns the bytes of an array, [length of the first axis, bytes]; for a scalar, [1, bytes]."""
    words = mx.contiguous(array).view({8: mx.uint64, 4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[array.itemsize])
    mx.eval(words)
    return np.array(words, copy=False).reshape(array.shape[0] if array.ndim else 1, -1).view(np.uint8)
