"""Traces the arrays of a network to the tensors in files that they are made of.

A network of mlx-lm has a method ``sanitize``, which converts the names and shapes of a published checkpoint to its own.
Here, it runs on arrays without data, and MLX reports the operations of the graph. Operations that only slice, transpose
or stack are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ...checkpoint.safetensors import TensorInfo
from .stored_arrays import StoredArray, TensorSlice, contiguous


@dataclass(frozen=True)
class Computed:
    """An array that is in no file: the operation that computes it, and the files with its inputs."""

    operation: str
    files: frozenset[Path] = frozenset()


Found: TypeAlias = StoredArray | Computed
_LOCK = Lock()  # MLX traces one function at a time


def traced(
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    held: Mapping[str, TensorInfo],
    arrays: Mapping[str, mx.array],
    wanted: Sequence[str],
) -> dict[str, Found]:
    """Returns the sources of the arrays that ``sanitize`` returns, without reading weights.

    Args:
        held: the tensors of the files.
        arrays: the same, lazily loaded, for their shapes and dtypes.
        wanted: names of results. Names that do not exist are ignored.
    """
    names: list[str] = []

    def made(*stored: mx.array) -> list[mx.array]:
        results = sanitize(dict(zip(arrays, stored, strict=True)))
        names.extend(name for name in wanted if name in results)
        return [results[name] for name in names]

    found: dict[str, Found] = {}
    results: list[str] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["type"] == "inputs":
            for (label, _, dtype), name in zip(event["inputs"], arrays, strict=True):
                found[label] = StoredArray((TensorSlice.whole(held[name]),), dtype)
        elif event["type"] == "outputs":
            results.extend(label for label, _, _ in event["outputs"])
        elif event["type"] == "constants":
            found.update({label: Computed("a constant") for label, _ in event["constants"]})
        elif event["type"] == "primitive":
            inputs = [found[label] for label, _, _ in event["inputs"]]
            outputs = [(tuple(shape), dtype) for _, shape, dtype in event["outputs"]]
            made_of = _followed(event["name"], event["arguments"], inputs, outputs)
            found.update(zip((label for label, _, _ in event["outputs"]), made_of, strict=True))

    with _LOCK, _without_copies():
        mx.export_function(watch, made, *arrays.values())
    return {name: found[label] for name, label in zip(names, results, strict=True)}


@contextmanager
def _without_copies() -> Iterator[None]:
    """Replaces ``mx.contiguous`` inside the block, because MLX cannot report it. Other threads get the same values."""
    copying = mx.contiguous
    mx.contiguous = lambda array, *_, **__: array
    try:
        yield
    finally:
        mx.contiguous = copying


def _followed(
    operation: str,
    arguments: Sequence[Any],
    inputs: Sequence[Found],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[Found]:
    """Returns the sources of an operation's outputs, which have these shapes and dtypes."""
    sources = [source for source in inputs if isinstance(source, StoredArray)]
    computed = [source for source in inputs if isinstance(source, Computed)]
    unknown = Computed(operation, frozenset[Path]().union(*(source.files for source in inputs)))
    if computed:
        return [unknown if sources else replace(unknown, operation=computed[0].operation)] * len(outputs)
    if operation == "Concatenate" and arguments[0] == 0:
        return [StoredArray(tuple(s for source in sources for s in source.slices), outputs[0][1])]
    if len(sources) != 1:
        return [unknown] * len(outputs)
    found, start = list[Found](), 0
    for shape, dtype in outputs:
        found.append(_changed(sources[0], operation, arguments, shape, dtype, start) or unknown)
        start += shape[arguments[1]] if operation == "Split" else 0
    return found


def _changed(
    source: StoredArray, operation: str, arguments: Sequence[Any], shape: tuple[int, ...], dtype: mx.Dtype, start: int
) -> StoredArray | None:
    """Returns the source of one output (in a split, that which begins at ``start``); None if it is not a view of the
    input.
    """
    many = len(source.slices) > 1
    if many and (shape[:1] != source.shape[:1] or (operation == "Transpose" and arguments[0][0] != 0)):
        return None
    found = []
    for old in source.slices:
        mine = (len(old.view), *shape[1:]) if many else shape
        index = [slice(None)] * old.view.ndim
        view: np.ndarray | None
        match operation:
            case "Slice":
                for axis in range(many, len(index)):
                    index[axis] = slice(*(bounds[axis] for bounds in arguments))
                view = old.view[tuple(index)]
            case "Split":
                index[arguments[1]] = slice(start, start + shape[arguments[1]])
                view = old.view[tuple(index)]
            case "Transpose":
                view = old.view.transpose(arguments[0])
            case "View" if old.view.itemsize == dtype.size or old.view.strides[-1:] == (old.view.itemsize,):
                view = old.view.view(f"u{dtype.size}")
            case "Copy" | "StopGradient":
                view = old.view
            case "Reshape" | "Flatten" | "Unflatten" | "Squeeze" | "ExpandDims":
                view = _reshaped(old.view, mine)
            case _:
                return None
        if view is None:
            return None
        found.append(TensorSlice(old.info, view))
    return StoredArray(tuple(found), dtype)


def _reshaped(view: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a view with another shape; None if this would need a copy."""
    if view.flags.c_contiguous:
        return contiguous(view, shape)
    if [n for n in view.shape if n > 1] != [n for n in shape if n > 1]:
        return None
    strides = iter([stride for n, stride in zip(view.shape, view.strides, strict=True) if n > 1])
    return as_strided(view, shape, [next(strides) if n > 1 else 0 for n in shape], writeable=False)
