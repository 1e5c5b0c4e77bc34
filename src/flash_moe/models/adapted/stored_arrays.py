"""The places of an expert module's parameters in files, and records made of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ...checkpoint.records import Extents
from ...checkpoint.safetensors import DTYPE_BITS, TensorInfo
from ...dtypes import NAMES
from ...errors import CheckpointError
from ...formats import Quantization
from ...record import Part, RecordLayout

Key: TypeAlias = tuple[str, str]  # linear layer, name of the parameter
_ORIGIN = np.zeros(8, np.uint8)


@dataclass(frozen=True)
class TensorSlice:
    """Some elements of a tensor of a file.

    Attributes:
        view: which ones: strides, and an address that counts from that of an array here. It has no content; NumPy does the
            arithmetic of slices and transpositions.
    """

    info: TensorInfo
    view: np.ndarray

    @classmethod
    def whole(cls, info: TensorInfo) -> TensorSlice:
        """Returns all of a tensor."""
        item = DTYPE_BITS[info.dtype] // 8
        return cls(info, contiguous(_ORIGIN[:item].view(f"u{item}"), info.shape))

    @property
    def start(self) -> int:
        """Bytes before the first element."""
        return self.view.ctypes.data - _ORIGIN.ctypes.data


def contiguous(first: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Elements one behind the other, from the first of an array on; none is touched."""
    strides = [first.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return as_strided(first, shape, strides, writeable=False)


@dataclass(frozen=True)
class StoredArray:
    """An array as files hold it: slices one after the other, along the first axis, which is that of experts.

    Attributes:
        dtype: of the array; the file may call the same bytes otherwise.
    """

    slices: tuple[TensorSlice, ...]
    dtype: mx.Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first, *others = (s.view.shape for s in self.slices)
        return (first[0] + sum(shape[0] for shape in others), *first[1:]) if first else ()

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(s.info.file for s in self.slices)

    @cached_property
    def experts(self) -> tuple[TensorSlice, ...]:
        """The share of each expert; that of the first alone where all are in one tensor."""
        if len(self.slices) == 1:
            return (TensorSlice(self.slices[0].info, self.slices[0].view[0, ...]),)
        return tuple(TensorSlice(s.info, s.view[i, ...]) for s in self.slices for i in range(len(s.view)))

    @property
    def is_extent(self) -> bool:
        """Whether an expert's bytes lie one behind the other, in their order."""
        return bool(self.experts[0].view.flags.c_contiguous)

    @property
    def tensor_share(self) -> int:
        """Bytes of an expert in the tensor, or of the tensor where each expert has its own."""
        info = self.slices[0].info
        return info.nbytes // self.shape[0] if len(self.slices) == 1 else info.nbytes

    @property
    def is_regular(self) -> bool:
        """Whether records can be made of it: all experts alike, each in its own share of a tensor or in its own tensor."""
        first = self.experts[0]
        if len(self.slices) == 1:
            return self.is_extent or (self.slices[0].view.strides[0], first.info.shape[0]) == (
                self.tensor_share, self.shape[0],
            )  # fmt: skip
        alike = {(s.view.strides, s.info.nbytes, self.is_extent or s.start) for s in self.experts}
        return len(alike) == 1 and len(self.experts) == len(self.slices)

    def extents(self, at: int) -> Extents:
        """Where the records' bytes are: those of each expert, or its whole share where they are no extent."""
        step = self.slices[0].view.strides[0]
        places = [(p.info.file, p.info.offset + self.is_extent * p.start) for p in self.experts]
        nbytes = self.experts[0].view.nbytes if self.is_extent else self.tensor_share
        return Extents(nbytes, at, *places[0], step) if len(self.slices) == 1 else Extents(nbytes, at, scattered=places)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the part of a record that :meth:`extents` fills."""
        view, info = self.experts[0].view, self.slices[0].info
        if self.is_extent:
            return view.shape or (1,)
        size = self.tensor_share // view.itemsize
        columns = view.shape[-1] if view.strides[-1] == view.itemsize else info.shape[-1]
        return (size // columns, columns) if columns < size else (size,)


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a record: elements of a part, counted and strided in elements."""

    part: Part
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, part: Part, shape: tuple[int, ...]) -> Place:
        """Returns all of a part."""
        return cls(part, 0, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))

    @property
    def is_part(self) -> bool:
        """Whether it is all of the part."""
        return self == Place.whole(self.part, self.shape) and math.prod(self.shape) == math.prod(self.part.shape)

    def of(self, records: np.ndarray) -> np.ndarray:
        """Returns the parameter of every record [N, stride] uint8: [N, ...] of unsigned integers, a view."""
        item = DTYPE_BITS[self.part.dtype] // 8
        first = records[:1, self.part.offset + self.start * item :][0, :item].view(f"u{item}")
        strides = (records.strides[0], *(item * stride for stride in self.strides))
        return as_strided(first, (len(records), *self.shape), strides, writeable=False)


def layer_records(
    sources: Mapping[Key, StoredArray], quantization: Mapping[str, Quantization]
) -> tuple[RecordLayout, list[Extents], dict[Key, Place]]:
    """Returns the layout of a layer's records, where their parts are in files, and where parameters are in records.

    A parameter whose elements are no extent, as rows that alternate with another's or a transposed matrix, is a view
    of all that its tensor holds of an expert; such a part belongs to all linear layers that look at it.

    Args:
        sources: of every parameter of the expert module.
        quantization: of its quantised linear layers.

    Raises:
        CheckpointError: an expert's share is no extent and no share of a tensor.
    """
    shared: dict[Hashable, list[Key]] = {}
    for key, source in sources.items():
        if not source.is_regular:
            raise CheckpointError(
                f"{'.'.join(key)}, from tensor {source.slices[0].info.name!r} of {source.slices[0].info.file}, cannot be cut "
                "into records; convert the checkpoint with mlx_lm.convert"
            )
        shared.setdefault(key if source.is_extent else source.slices[0].info.name, []).append(key)
    parts, found = [], dict(quantization)
    for keys in shared.values():
        linear, source = "+".join(linear for linear, _ in keys), sources[keys[0]]
        parts.append((linear, keys[0][1], NAMES[source.dtype], source.stored_shape))
        if keys[0][0] in quantization:
            found[linear] = quantization[keys[0][0]]
    layout = RecordLayout.of(parts, {linear: q for linear, q in found.items() if linear in {part[0] for part in parts}})
    extents, places = [], {}
    for keys, part in zip(shared.values(), layout.parts, strict=True):
        extents.append(sources[keys[0]].extents(part.offset))
        for key in keys:
            first = sources[key].experts[0]
            start = 0 if sources[key].is_extent else first.start // first.view.itemsize
            strides = tuple(stride // first.view.itemsize for stride in first.view.strides)
            places[key] = Place(part, start, first.view.shape, strides)
    return layout, extents, places
