"""The locations of an expert module's parameters in files, and the records that they form."""

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

Key: TypeAlias = tuple[str, str]  # linear layer and name of the parameter
_ORIGIN = np.zeros(8, np.uint8)


@dataclass(frozen=True)
class TensorSlice:
    """A selection of the elements of a tensor in a file.

    Attributes:
        view: an array without data whose address and strides describe the selection. NumPy computes slices and
            transpositions of it.
    """

    info: TensorInfo
    view: np.ndarray

    @classmethod
    def whole(cls, info: TensorInfo) -> TensorSlice:
        """Returns a slice with all elements of a tensor."""
        item = DTYPE_BITS[info.dtype] // 8
        return cls(info, contiguous(_ORIGIN[:item].view(f"u{item}"), info.shape))

    @property
    def start(self) -> int:
        """The number of bytes before the first element."""
        return self.view.ctypes.data - _ORIGIN.ctypes.data


def contiguous(first: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a contiguous view that starts at the first element of an array, without accessing its memory."""
    strides = [first.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return as_strided(first, shape, strides, writeable=False)


@dataclass(frozen=True)
class StoredArray:
    """An array as it is stored in files: slices that follow each other along the first axis, that of experts.

    Attributes:
        dtype: dtype of the array. The file may have another name for the same bytes.
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
        """The slice of each expert; only that of the first expert if all are in one tensor."""
        if len(self.slices) == 1:
            return (TensorSlice(self.slices[0].info, self.slices[0].view[0, ...]),)
        return tuple(TensorSlice(s.info, s.view[i, ...]) for s in self.slices for i in range(len(s.view)))

    @property
    def is_extent(self) -> bool:
        """Whether the bytes of an expert are contiguous and in order."""
        return bool(self.experts[0].view.flags.c_contiguous)

    @property
    def tensor_share(self) -> int:
        """The bytes of an expert in the tensor, or of the whole tensor if each expert has its own."""
        info = self.slices[0].info
        return info.nbytes // self.shape[0] if len(self.slices) == 1 else info.nbytes

    @property
    def is_regular(self) -> bool:
        """Whether it can form records: all experts have the same form, in equal shares of a tensor or in separate
        tensors.
        """
        first = self.experts[0]
        if len(self.slices) == 1:
            return self.is_extent or (self.slices[0].view.strides[0], first.info.shape[0]) == (
                self.tensor_share, self.shape[0],
            )  # fmt: skip
        alike = {(s.view.strides, s.info.nbytes, self.is_extent or s.start) for s in self.experts}
        return len(alike) == 1 and len(self.experts) == len(self.slices)

    def extents(self, at: int) -> Extents:
        """Returns the extents of the records: the bytes of each expert, or its whole share of the tensor if they are
        not contiguous.
        """
        step = self.slices[0].view.strides[0]
        places = [(p.info.file, p.info.offset + self.is_extent * p.start) for p in self.experts]
        nbytes = self.experts[0].view.nbytes if self.is_extent else self.tensor_share
        return Extents(nbytes, at, *places[0], step) if len(self.slices) == 1 else Extents(nbytes, at, scattered=places)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the record's part that :meth:`extents` fills."""
        view, info = self.experts[0].view, self.slices[0].info
        if self.is_extent:
            return view.shape or (1,)
        size = self.tensor_share // view.itemsize
        columns = view.shape[-1] if view.strides[-1] == view.itemsize else info.shape[-1]
        return (size // columns, columns) if columns < size else (size,)


@dataclass(frozen=True)
class Place:
    """The place of a parameter in a record: elements of a part, with offset and strides in elements."""

    part: Part
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, part: Part, shape: tuple[int, ...]) -> Place:
        """Returns the place that covers a whole part."""
        return cls(part, 0, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))

    @property
    def is_part(self) -> bool:
        """Whether the parameter is the whole part."""
        return self == Place.whole(self.part, self.shape) and math.prod(self.shape) == math.prod(self.part.shape)

    def of(self, records: np.ndarray) -> np.ndarray:
        """Returns a view of the parameter in every record [N, stride] uint8, as unsigned integers [N, ...]."""
        item = DTYPE_BITS[self.part.dtype] // 8
        first = records[:1, self.part.offset + self.start * item :][0, :item].view(f"u{item}")
        strides = (records.strides[0], *(item * stride for stride in self.strides))
        return as_strided(first, (len(records), *self.shape), strides, writeable=False)


def layer_records(
    sources: Mapping[Key, StoredArray], quantization: Mapping[str, Quantization]
) -> tuple[RecordLayout, list[Extents], dict[Key, Place]]:
    """Returns the layout of a layer's records, the extents of their parts, and the places of parameters in records.

    If the elements of a parameter are not contiguous, for instance interleaved rows or a transposed matrix, the
    parameter is a view of the whole share of an expert in the tensor. All linear layers with views of such a part use
    it.

    Args:
        sources: stored array of every parameter of the expert module.
        quantization: quantisation of its quantised linear layers.

    Raises:
        CheckpointError: the bytes of an expert are neither contiguous nor an equal share of a tensor.
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
