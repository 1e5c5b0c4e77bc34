"""Where the bytes of an expert module's parameters lie, and records made of them, whatever parameters there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...checkpoint.records import Run
from ...checkpoint.safetensors import TensorInfo
from ...errors import CheckpointError
from ...formats import ITEM_SIZE, Quantization
from ...record import RecordLayout

INTERLEAVED = "gate_up_proj"  # a linear layer of which the even rows are gate_proj and the odd ones up_proj
_HALVES = ("gate_proj", "up_proj")
Key: TypeAlias = tuple[str, str]  # linear layer, name of the parameter


@dataclass(frozen=True)
class Rows:
    """A tensor of a file, or of every expert in it the rows from ``start`` in steps of ``step``.

    Attributes:
        dtype, shape: of the parameter; the file may hold the same bytes under another type. [E, rows, ...] or [E].
    """

    info: TensorInfo
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    step: int = 1

    @property
    def is_cut(self) -> bool:
        """Whether the parameter is not the whole tensor."""
        return math.prod(self.shape) * ITEM_SIZE.get(self.dtype, 0) != self.info.nbytes

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    def viewed(self, dtype: str, shape: tuple[int, ...]) -> Rows | None:
        """The same bytes as another type; None where rows were cut out."""
        return None if self.is_cut else replace(self, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class Stack:
    """A tensor of each expert, one after the other."""

    rows: tuple[Rows, ...]

    @property
    def dtype(self) -> str:
        return self.rows[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.rows[0].shape)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(rows.info for rows in self.rows)

    def viewed(self, dtype: str, shape: tuple[int, ...]) -> Stack | None:
        """The same bytes as another type."""
        viewed = [rows.viewed(dtype, shape[1:]) for rows in self.rows]
        found = tuple(rows for rows in viewed if rows is not None)
        return Stack(found) if len(found) == len(self.rows) else None


Source: TypeAlias = Rows | Stack


def layer_records(
    sources: Mapping[Key, Source], quantization: Mapping[str, Quantization]
) -> tuple[RecordLayout, list[Run]]:
    """Returns the layout of a layer's records and where their parts are.

    Rows of gate_proj and up_proj that alternate in a file stay together, as the linear layer :data:`INTERLEAVED`.

    Args:
        sources: of every parameter of the expert module.
        quantization: of its quantised linear layers.
    """
    if _alternate(sources):
        gates = {(INTERLEAVED, name): _whole(s) for (linear, name), s in sources.items() if linear == _HALVES[0]}
        sources = gates | {key: source for key, source in sources.items() if key[0] not in _HALVES}
        quantization = {INTERLEAVED if name == _HALVES[0] else name: q for name, q in quantization.items()}
        quantization.pop(_HALVES[1], None)
    parts = [(linear, name, s.dtype, s.shape[1:] or (1,)) for (linear, name), s in sources.items()]
    layout = RecordLayout.of(parts, quantization)
    runs = [_run(source, part.nbytes, part.offset) for source, part in zip(sources.values(), layout.parts, strict=True)]
    return layout, runs


def _alternate(sources: Mapping[Key, Source]) -> bool:
    cut = {key: s for key, s in sources.items() if isinstance(s, Rows) and s.step != 1}
    if not cut:
        return False
    halves = {key for key in sources if key[0] in _HALVES}
    pairs = [(cut.get((_HALVES[0], name)), cut.get((_HALVES[1], name))) for _, name in halves]
    if set(cut) != halves or not all(
        gate and up and gate.info == up.info and (gate.start, gate.step, up.start, up.step) == (0, 2, 1, 2)
        for gate, up in pairs
    ):
        name = next(iter(cut.values())).info.name
        raise CheckpointError(f"rows of {name!r} are spread over several weights; convert with mlx_lm.convert")
    return True


def _whole(source: Source) -> Source:
    assert isinstance(source, Rows)
    experts, rows, *rest = source.shape
    return replace(source, shape=(experts, 2 * rows, *rest), start=0, step=1)


def _run(source: Source, nbytes: int, at: int) -> Run:
    if isinstance(source, Stack):
        return Run(nbytes, at, scattered=[(rows.info.file, rows.info.offset) for rows in source.rows])
    row = math.prod(source.shape[2:]) * ITEM_SIZE[source.dtype]
    return Run(
        nbytes, at, source.info.file, source.info.offset + source.start * row, source.info.nbytes // source.shape[0]
    )
