"""Locates every record: a list of extents per expert, for all forms of checkpoints.

A record has one extent in a packed checkpoint, nine in a stacked MLX checkpoint and three in a Hugging Face checkpoint.
Code that reads records needs no other information about a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ArgumentError, CheckpointError
from ..formats import FLOATS, FP8_BLOCK, ProjectionFormat, Quantization, part_shapes
from ..record import PROJECTIONS, ExpertShape, RecordLayout
from ..share import WHOLE, Share
from .folder import Checkpoint
from .names import ExpertTensor, expert_modules
from .packed import Manifest, PackedLayer, open_layer
from .safetensors import FileState, TensorInfo


@dataclass(frozen=True)
class Extent:
    """A byte range of a file: ``nbytes`` bytes at ``offset`` of ``file``, which begin ``at`` bytes into the record."""

    file: Path
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Extents:
    """The extents of one part in all records of a layer: expert e's is at ``base + e * step`` of one file, or in a
    list.

    Attributes:
        every: the file holds every ``every``-th expert. The bytes of expert e are at ``base + e // every * step``.
    """

    nbytes: int
    at: int
    file: Path | None = None
    base: int = 0
    step: int = 0
    scattered: Sequence[tuple[Path, int]] = ()
    every: int = 1

    @property
    def files(self) -> set[Path]:
        return {file for file, _ in self.scattered} if self.file is None else {self.file}

    def extent(self, expert: int) -> Extent:
        if self.file is None:
            file, offset = self.scattered[expert]
            return Extent(file, offset, self.nbytes, self.at)
        return Extent(self.file, self.base + expert // self.every * self.step, self.nbytes, self.at)


@dataclass(frozen=True)
class RecordTable:
    """The layouts and locations of all records.

    Attributes:
        layouts: record layout by layer index, for layers with routed experts.
        packed: whether each record is one extent that starts at a multiple of 16 KiB in its file.
        states: the state of every record file when its header was read.
        share: the share of the experts in the table. Other experts are never requested, and may be missing from the
            files.
    """

    num_experts: int
    layouts: Mapping[int, RecordLayout]
    packed: bool
    states: Mapping[Path, FileState]
    _extents: Mapping[int, Sequence[Extents]]
    share: Share = WHOLE

    def of_share(self, share: Share) -> RecordTable:
        """Returns a table with only the records of a share.

        Raises:
            CheckpointError: the files hold another share.
        """
        if not self.share.is_whole and self.share != share:
            wanted = "all experts are needed" if share.is_whole else f"share {share} is needed"
            raise CheckpointError(
                f"{self.files[0].parent} holds share {self.share} of the experts, but {wanted}; use a folder that has them, "
                "or run all shares together in a group of machines"
            )
        if share.count > self.num_experts:
            raise ArgumentError(f"{share.count} shares of {self.num_experts} experts, expected no more than experts")
        return replace(self, share=share)

    def experts(self, layer: int) -> range:
        """Returns the experts of a layer in the table, in ascending order."""
        return self.share.experts(layer, self.num_experts)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """Returns the extents of a record, in the order of the record."""
        if not self.share.owns(layer, expert):
            raise ArgumentError(f"expert {expert} of layer {layer} is not in share {self.share}; ask its owner")
        return [part.extent(expert) for part in self._extents[layer]]

    @property
    def files(self) -> list[Path]:
        """Returns all files with records, sorted."""
        return sorted({file for parts in self._extents.values() for part in parts for file in part.files})

    @property
    def count(self) -> int:
        """The number of records of all layers."""
        return sum(len(self.experts(layer)) for layer in self.layouts)

    @property
    def max_stride(self) -> int:
        """The bytes of the largest record."""
        return max((layout.stride for layout in self.layouts.values()), default=0)

    @property
    def nbytes(self) -> int:
        """The bytes of all records."""
        return sum(layout.stride * len(self.experts(layer)) for layer, layout in self.layouts.items())

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RecordTable:
        """Locates the records of a checkpoint. It reads only headers.

        Raises:
            CheckpointError: the experts of a layer are missing or incomplete, or have the wrong dtype or shape.
        """
        shape = checkpoint.shape
        if (manifest := Manifest.load(checkpoint.folder)) is not None:
            if missing := [layer for layer in shape.layers if layer not in manifest.layers]:
                raise CheckpointError(
                    f"{checkpoint.folder} holds no experts of layer {missing[0]}; convert the model again"
                )
            layers = {layer: manifest.layers[layer] for layer in shape.layers}
            for layer, packed in layers.items():
                _check_dimensions(layer, packed.layout, shape)
            return cls.packed_in(checkpoint.folder, layers, shape.num_experts, manifest.share)
        layouts: dict[int, RecordLayout] = {}
        extents: dict[int, Sequence[Extents]] = {}
        for layer in shape.layers:
            layouts[layer], extents[layer] = _assembled_layer(checkpoint, layer)
        states = {tensor.file: tensor.state for tensor in checkpoint.experts.values()}
        return cls(shape.num_experts, layouts, False, states, extents)

    @classmethod
    def packed_in(
        cls, folder: Path, layers: Mapping[int, PackedLayer], num_experts: int, share: Share = WHOLE
    ) -> RecordTable:
        """Locates the records of packed layers.

        Args:
            share: the share of the experts in the files.

        Raises:
            CheckpointError: the file of a layer is missing or does not match its description.
        """
        tensors = {
            layer: open_layer(folder, layer, packed, len(share.experts(layer, num_experts)))
            for layer, packed in layers.items()
        }
        layouts = {layer: packed.layout for layer, packed in layers.items()}
        extents = {
            layer: [
                Extents(layouts[layer].stride, 0, tensor.file, tensor.offset, layouts[layer].stride, every=share.count)
            ]
            for layer, tensor in tensors.items()
        }
        states = {tensor.file: tensor.state for tensor in tensors.values()}
        return cls(num_experts, layouts, True, states, extents, share)


def _check_dimensions(layer: int, layout: RecordLayout, shape: ExpertShape) -> None:
    if set(layout.linears) != set(PROJECTIONS):
        raise CheckpointError(
            f"records of layer {layer} hold {', '.join(layout.linears)}, expected {', '.join(PROJECTIONS)}; convert again"
        )
    found, expected = (layout.hidden_size, layout.intermediate_size), (shape.hidden_size, shape.intermediate_size)
    if found != expected or any((p.rows, p.columns) != shape.matrix(name) for name, p in layout.projections):
        raise CheckpointError(
            f"records of layer {layer} have hidden and intermediate size {found}, config.json says {expected}; "
            "convert the model again"
        )


def _assembled_layer(checkpoint: Checkpoint, layer: int) -> tuple[RecordLayout, list[Extents]]:
    """Returns the layout and the extents of a layer whose projections are separate tensors."""
    sources = {name: _Projection(checkpoint, layer, name) for name in PROJECTIONS}
    parts = [(name, part, *stored) for name, source in sources.items() for part, stored in source.parts.items()]
    quantization = {name: q for name, source in sources.items() if (q := source.format.quantization) is not None}
    layout = RecordLayout.of(parts, quantization)
    return layout, [sources[part.linear].extents(part.name, part.offset, part.nbytes) for part in layout.parts]


class _Projection:
    """The tensors with one projection of all experts of a layer, and the part of each expert in them."""

    def __init__(self, checkpoint: Checkpoint, layer: int, name: str) -> None:
        self.experts = checkpoint.experts
        self.shape = checkpoint.shape
        self.layer, self.name = layer, name
        self.fused = ExpertTensor(layer, None, "gate_up_proj", "weight") in self.experts and name != "down_proj"
        weight = self._tensor("weight", 0)
        quantization = None
        if weight.dtype == "F8_E4M3":
            block = self._tensor("scales", 0)
            self.format = ProjectionFormat(block.dtype, Quantization(8, 1, "fp8"))
            self.parts = {
                "weight": (weight.dtype, self.shape.matrix(name)),
                "scales": (block.dtype, self._block(block)),
            }
            return
        modules = expert_modules(layer, name, fused=self.fused)
        stated = checkpoint.quantization.stated(modules)
        if (scales := self._find("scales", 0)) is not None:
            quantization = checkpoint.quantization.of(modules, weight, scales)
            if not quantization.is_affine and (biases := self._find("biases", 0)) is not None:
                raise CheckpointError(
                    f"{scales.file}: {scales.name!r} is U8, as in mode {quantization.mode}, which has no biases, but there "
                    f"is {biases.name!r}; download the checkpoint again"
                )
        floats = scales or weight
        if floats.dtype not in (("U8",) if quantization and not quantization.is_affine else FLOATS):
            raise CheckpointError(
                f"{floats.file}: tensor {floats.name!r} is {floats.dtype}, expected {', '.join(FLOATS)} "
                "(or U32 with scales and biases); use the bf16 checkpoint or one written by mlx_lm.convert"
            )
        has_global = self._find("global_scale", 0) is not None or (stated is not None and stated.global_scale)
        self.format = ProjectionFormat(floats.dtype, quantization, has_global)
        self.parts = part_shapes(*self.shape.matrix(name), self.format)

    def _block(self, scales: TensorInfo) -> tuple[int, ...]:
        """Returns the shape of an expert's FP8 scales: one per block of 128 × 128, per row, or per matrix."""
        stacked = scales is self._find("scales", None)
        shape = scales.shape[1:] if stacked else scales.shape
        if self.fused and len(shape) == 2:
            shape = (shape[0] // 2, shape[1])
        rows, columns = self.shape.matrix(self.name)
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        split = self.fused and rows % FP8_BLOCK  # a block with rows of gate_proj and of up_proj
        allowed = (*(() if split else (blocks,)), (rows, 1), (1,))
        if shape not in allowed:
            raise CheckpointError(
                f"{scales.file}: {scales.name!r} has scales of shape {list(scales.shape)}, expected for each expert one of "
                f"{', '.join(str(list(each)) for each in allowed)}; config.json and weights do not belong together"
            )
        return shape

    def _find(self, part: str, expert: int | None) -> TensorInfo | None:
        name = "gate_up_proj" if self.fused else self.name
        stacked = self.experts.get(ExpertTensor(self.layer, None, name, part))
        return stacked or self.experts.get(ExpertTensor(self.layer, expert, name, part))

    def _tensor(self, part: str, expert: int) -> TensorInfo:
        if (info := self._find(part, expert)) is None:
            raise CheckpointError(
                f"the {part} of {self.name} of expert {expert} in layer {self.layer} is in no file; "
                "the checkpoint is incomplete: finish the download"
            )
        return info

    def extents(self, part: str, at: int, nbytes: int) -> Extents:
        """Checks the dtypes and shapes of the tensors of one part, and returns its extents."""
        dtype, shape = self.parts[part]
        first = self._tensor(part, 0)
        if first is not self._find(part, None):
            tensors = [self._tensor(part, expert) for expert in range(self.shape.num_experts)]
            for info in tensors:
                _check(info, dtype, shape)
            return Extents(first.nbytes, at, scattered=[(info.file, info.offset) for info in tensors])
        if part == "global_scale":  # one number per expert
            shape = shape[1:]
        elif self.fused and len(shape) == 2:
            shape = (2 * shape[0], *shape[1:])
        _check(first, dtype, (self.shape.num_experts, *shape))
        step = first.nbytes // self.shape.num_experts
        skip = nbytes if self.fused and self.name == "up_proj" else 0
        return Extents(nbytes, at, first.file, first.offset + skip, step)


def _check(info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> None:
    if (info.dtype, info.shape) != (dtype, shape):
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} is {info.dtype} {list(info.shape)}, but config.json asks for "
            f"{dtype} {list(shape)}; config.json and weights do not belong together"
        )
