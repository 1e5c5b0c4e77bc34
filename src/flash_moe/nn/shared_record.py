"""The shared expert in the form of a record, so that kernels compute it with the routed ones."""

from __future__ import annotations

import mlx.core as mx

from ..dtypes import DTYPES
from ..record import RecordLayout
from .weights import Weights


def shared_record(weights: Weights, intermediate_size: int, layout: RecordLayout) -> tuple[mx.array, Weights] | None:
    """Copies the shared expert into a record.

    Args:
        weights: weights of the shared expert.
        intermediate_size: width of the shared expert.
        layout: layout of the layer's records.

    Returns:
        The record, [words] uint32, and the weights as views of it; None if the sizes or formats of the shared
            expert differ from those of the routed experts.
    """
    if intermediate_size != layout.intermediate_size:
        return None
    words: list[mx.array] = []
    views, quantization = {}, {}
    for name, projection in layout.projections:
        shape = intermediate_size, layout.hidden_size
        stored = weights.linear(name, *(shape[::-1] if name == "down_proj" else shape))
        if projection.quantization is None or stored.quantization != projection.quantization:
            return None
        if stored.global_scale is not None and projection.global_scale is None:
            return None
        quantization[name] = projection.quantization
        for part in projection.parts:
            if (array := getattr(stored, part.name)) is None:
                return None
            cast = array.astype(DTYPES[part.dtype])
            if cast.dtype != array.dtype and not mx.array_equal(cast.astype(array.dtype), array):
                return None  # scales with a higher precision than those of the records
            words += [_words(cast), mx.zeros((_gap(layout, part.offset + part.nbytes),), dtype=mx.uint32)]
            views[part.key] = (part, array.dtype)
    record = mx.concatenate(words)
    parts = {
        name: record[part.offset // 4 : (part.offset + part.nbytes) // 4]
        .view(DTYPES[part.dtype])
        .reshape(part.shape)
        .astype(dtype)
        for name, (part, dtype) in views.items()
    }
    return record, Weights(parts, quantization, join=False)


def _words(array: mx.array) -> mx.array:
    return mx.contiguous(array).reshape(-1).view(mx.uint32)


def _gap(layout: RecordLayout, end: int) -> int:
    """Returns the number of words from the end of a part to the start of the next, or to the end of the record."""
    starts = [part.offset for part in layout.parts] + [layout.stride]
    return (min(start for start in starts if start >= end) - end) // 4
