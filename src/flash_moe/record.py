"""The layout of a record: all weights of one expert of one layer, as one sequence of bytes.

A record is a list of parts. For each linear layer of the expert, these are the weight and, if present, scales, biases,
the bias that is added to the output, and a global scale. Each part starts at a multiple of 64 bytes. The stride from
one record to the next is a multiple of 16 KiB, the page size of Apple silicon, so that each record can be mapped
separately. This module only computes sizes: it uses no files and no arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import CheckpointError
from .formats import ITEM_SIZE, ProjectionFormat, Quantization, part_shapes

PART_ALIGNMENT = 64
RECORD_ALIGNMENT = 16 * 1024
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ExpertShape:
    """The number and sizes of a model's routed experts.

    Attributes:
        num_experts: number of experts per layer.
        experts_per_token: the model's own K.
        hidden_size, intermediate_size: width of an expert's input and output, and width between its linear layers.
        layers: indices of the layers that have routed experts.
    """

    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]

    def matrix(self, projection: str) -> tuple[int, int]:
        """Returns the rows and columns of a projection of an expert: [I, H] for gate and up, [H, I] for down."""
        shape = (self.intermediate_size, self.hidden_size)
        return shape[::-1] if projection == "down_proj" else shape


@dataclass(frozen=True)
class Part:
    """One array in a record: ``shape`` elements of safetensors type ``dtype``, ``offset`` bytes from the start.

    Attributes:
        linear: the linear layer that the part belongs to, e.g. ``"gate_proj"``.
        name: the role of the part in that layer: ``"weight"``, ``"scales"``, ``"biases"``, ``"bias"`` or
            ``"global_scale"``.
    """

    linear: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def key(self) -> str:
        """The linear layer and the name, e.g. ``"gate_proj.weight"``."""
        return f"{self.linear}.{self.name}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class ProjectionLayout:
    """The parts of one linear layer; missing parts are None."""

    weight: Part
    scales: Part | None = None
    biases: Part | None = None
    bias: Part | None = None
    global_scale: Part | None = None
    quantization: Quantization | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        found = (self.weight, self.scales, self.biases, self.bias, self.global_scale)
        return tuple(part for part in found if part is not None)

    @property
    def rows(self) -> int:
        """The number of outputs of the layer."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """The number of inputs of the layer."""
        words, bits = self.weight.shape[1], 8 * ITEM_SIZE[self.weight.dtype]
        return words if self.quantization is None else words * bits // self.quantization.bits

    @property
    def format(self) -> ProjectionFormat:
        return ProjectionFormat((self.scales or self.weight).dtype, self.quantization, self.global_scale is not None)


@dataclass(frozen=True)
class RecordLayout:
    """The place of each part in a record.

    Attributes:
        parts: the parts in the order of their offsets.
        quantization: the quantisation of each quantised linear layer, by name.
        stride: bytes from one record to the next.
    """

    parts: tuple[Part, ...]
    quantization: Mapping[str, Quantization]
    stride: int

    @classmethod
    def of(
        cls,
        parts: Iterable[tuple[str, str, str, tuple[int, ...]]],
        quantization: Mapping[str, Quantization],
    ) -> RecordLayout:
        """Places parts, given as (linear layer, name, dtype, shape), one after the other."""
        offset, placed = 0, []
        for linear, name, dtype, shape in parts:
            placed.append(Part(linear, name, dtype, tuple(shape), offset))
            offset = round_up(offset + placed[-1].nbytes, PART_ALIGNMENT)
        return cls(tuple(placed), dict(quantization), round_up(offset, RECORD_ALIGNMENT))

    @classmethod
    def build(cls, hidden_size: int, intermediate_size: int, formats: Mapping[str, ProjectionFormat]) -> RecordLayout:
        """Returns the layout of a SwiGLU expert; ``formats`` has the keys gate_proj, up_proj and down_proj.

        Raises:
            CheckpointError: a group size does not divide the row length.
        """
        shape = ExpertShape(1, 1, hidden_size, intermediate_size, ())
        parts = [
            (linear, name, *part)
            for linear in PROJECTIONS
            for name, part in part_shapes(*shape.matrix(linear), formats[linear]).items()
        ]
        return cls.of(parts, {name: q for name in PROJECTIONS if (q := formats[name].quantization) is not None})

    @cached_property
    def linears(self) -> Mapping[str, ProjectionLayout]:
        """The linear layers by name, in the order of their offsets."""
        found: dict[str, dict[str, Part]] = {}
        for part in self.parts:
            found.setdefault(part.linear, {})[part.name] = part
        return {
            linear: ProjectionLayout(**parts, quantization=self.quantization.get(linear))
            for linear, parts in found.items()
        }

    @property
    def projections(self) -> tuple[tuple[str, ProjectionLayout], ...]:
        """The three projections of a SwiGLU expert."""
        return tuple((name, self.linears[name]) for name in PROJECTIONS)

    @property
    def gate_proj(self) -> ProjectionLayout:
        return self.linears["gate_proj"]

    @property
    def up_proj(self) -> ProjectionLayout:
        return self.linears["up_proj"]

    @property
    def down_proj(self) -> ProjectionLayout:
        return self.linears["down_proj"]

    @property
    def hidden_size(self) -> int:
        return self.down_proj.rows

    @property
    def intermediate_size(self) -> int:
        return self.gate_proj.rows

    @property
    def formats(self) -> dict[str, ProjectionFormat]:
        """The storage format of each linear layer."""
        return {name: layout.format for name, layout in self.linears.items()}

    def stored_as(self, formats: Mapping[str, ProjectionFormat]) -> RecordLayout:
        """Returns the layout with its linear layers in other formats; biases that are added to outputs stay the same.

        Raises:
            CheckpointError: a group size does not divide the row length.
        """
        parts = []
        for name, linear in self.linears.items():
            shapes = part_shapes(linear.rows, linear.columns, formats[name])
            bias = [] if linear.bias is None else [(name, "bias", linear.bias.dtype, linear.bias.shape)]
            parts += [(name, part, *stored) for part, stored in shapes.items()] + bias
        return RecordLayout.of(parts, {name: q for name, fmt in formats.items() if (q := fmt.quantization) is not None})

    @property
    def weights(self) -> int:
        """The number of weights of an expert."""
        return sum(linear.rows * linear.columns for linear in self.linears.values())

    @property
    def bits_per_weight(self) -> float:
        """The bits per weight of a record, including scales and biases, without padding."""
        return 8 * sum(part.nbytes for part in self.parts) / self.weights

    @property
    def _is_swiglu(self) -> bool:
        """Whether a record has exactly the parts of a layout from :meth:`build`."""
        if set(self.linears) != set(PROJECTIONS):
            return False
        return self == RecordLayout.build(self.hidden_size, self.intermediate_size, self.formats)

    def to_json(self) -> dict[str, Any]:
        """Returns a plain description from which :meth:`from_json` rebuilds the same layout."""
        if self._is_swiglu:
            formats = {name: fmt.to_json() for name, fmt in self.formats.items()}
            sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
            return {**sizes, "stride": self.stride, "projections": formats}
        return {
            "stride": self.stride,
            "quantization": {linear: q.to_json() for linear, q in self.quantization.items()},
            "parts": [[part.linear, part.name, part.dtype, list(part.shape)] for part in self.parts],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RecordLayout:
        """Rebuilds a layout written by :meth:`to_json`.

        Raises:
            CheckpointError: a key is missing, or the stated stride does not match the layout.
        """
        try:
            _check_sizes([data["stride"]])
            if "parts" in data:
                for _, _, _, shape in data["parts"]:
                    _check_sizes(shape)
                layout = cls.of(data["parts"], {name: Quantization(**q) for name, q in data["quantization"].items()})
                _check_parts(layout)
            else:
                formats = {name: ProjectionFormat.from_json(fmt) for name, fmt in data["projections"].items()}
                sizes = data["hidden_size"], data["intermediate_size"]
                _check_sizes(sizes)
                layout = cls.build(*sizes, formats)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"the record layout {data!r} is malformed ({error!r}); convert the model again"
            ) from None
        if layout.stride != data["stride"]:
            raise CheckpointError(
                f"records are {data['stride']} bytes apart, this layout needs {layout.stride}; convert again"
            )
        return layout


def _check_sizes(sizes: Iterable[object]) -> None:
    if any(type(n) is not int or n < 1 for n in sizes):
        raise TypeError("sizes are integers of at least 1")


def _check_parts(layout: RecordLayout) -> None:
    """Checks that each linear layer has the parts and shapes that its quantisation requires."""
    if not layout.parts or not set(layout.quantization) <= set(layout.linears):
        raise ValueError("quantised linear layers without parts")
    for name, linear in layout.linears.items():
        expected = part_shapes(linear.rows, linear.columns, linear.format)
        found = {part.name: (part.dtype, part.shape) for part in linear.parts}
        if any(found.get(part) != stored for part, stored in expected.items()):
            raise ValueError(f"parts of {name} do not fit its quantisation")
