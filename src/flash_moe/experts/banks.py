"""Banks of records: one array of whole records, or one array per part, which MLX's products can use in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..dtypes import DTYPES
from ..record import Part, RecordLayout
from .host_memory import new_bank, on_cuda

Bank = mx.array | dict[str, mx.array]  # [N, words] uint32; or per part, [N, rows, columns] in its dtype


class Target(NamedTuple):
    """Memory for a range of bytes of a record, which begins ``at`` bytes into the record."""

    at: int
    buffer: np.ndarray


Targets = np.ndarray | Sequence[Target]  # memory for a record: one buffer, or one per part


class RecordBank:
    """Slots that hold whole records.

    Attributes:
        bank: the array, or the arrays by part, for matrix products.
        memory: the whole memory of the bank, for advice about its pages.
    """

    def __init__(self, slots: int, stride: int) -> None:
        self.bank: Bank = new_bank(slots, stride // 4)
        self.memory = [np.array(self.bank, copy=False).view(np.uint8)]  # writable view of the bank's own memory

    def targets(self, slot: int) -> Targets:
        """Returns the memory of a slot, for reads."""
        return self.memory[0][slot]

    def rows(self, first: int, count: int) -> Bank:
        """Returns a view of consecutive slots."""
        assert isinstance(self.bank, mx.array)
        return self.bank[first : first + count]


class PartBank:
    """Slots with one array per part. Attributes and methods are those of :class:`RecordBank`."""

    def __init__(self, slots: int, layout: RecordLayout) -> None:
        # one extra slot, because MLX 0.32.4 on CUDA reads past the end of matrices with short rows
        more = int(on_cuda())
        words = {part.key: new_bank(slots + more, part.nbytes // 4)[:slots] for part in layout.parts}
        self._parts = layout.parts
        self.memory = [np.array(words[part.key], copy=False).view(np.uint8) for part in layout.parts]
        self.bank: Bank = {
            part.key: words[part.key].view(DTYPES[part.dtype]).reshape(slots, *part.shape) for part in layout.parts
        }
        mx.eval(self.bank)

    def targets(self, slot: int) -> Targets:
        return [Target(part.offset, memory[slot]) for part, memory in zip(self._parts, self.memory, strict=True)]

    def rows(self, first: int, count: int) -> Bank:
        assert isinstance(self.bank, dict)
        return {key: array[first : first + count] for key, array in self.bank.items()}


def make_bank(slots: int, layouts: Sequence[RecordLayout], by_part: bool) -> RecordBank | PartBank:
    """Returns a bank with ``slots`` slots for records of these layouts."""
    if by_part:
        return PartBank(slots, layouts[0])
    return RecordBank(slots, max((layout.stride for layout in layouts), default=0))


def counts_by_part(slots: int, layouts: Sequence[RecordLayout]) -> bool:
    """Returns whether MLX's products can address ``slots`` slots by part. On CUDA (0.32.4), they use 32-bit offsets."""
    most = max((layout.hidden_size * layout.intermediate_size for layout in layouts), default=0)
    return not on_cuda() or slots * most < 1 << 31


def can_lie_by_part(layouts: Sequence[RecordLayout], dtype: str) -> bool:
    """Returns whether a store can keep one array per part, for products in ``dtype`` (of safetensors).

    This requires that all layers have the same layout, that scales have the dtype of the computation, and that parts
    are whole words. Otherwise each use would copy the parts, as with whole records.
    """
    if not layouts or any(layout != layouts[0] for layout in layouts):
        return False
    if any(linear.quantization is None or linear.quantization.is_foreign for linear in layouts[0].linears.values()):
        return False
    return all(_in_place(part, dtype) for part in layouts[0].parts)


def _in_place(part: Part, dtype: str) -> bool:
    as_computed = part.dtype in ("U32", dtype) or (part.dtype == "U8" and part.name == "scales")
    return part.nbytes % 4 == 0 and as_computed


def put_together(bank: dict[str, mx.array], rows: Sequence[int], layout: RecordLayout) -> mx.array:
    """Copies rows of a bank by part into whole records, [K, words] uint32."""
    index, columns, end = mx.array(list(rows)), [], 0
    for part in layout.parts:
        words = bank[part.key][index].reshape(len(rows), -1).view(mx.uint32)
        columns += [mx.zeros((len(rows), (part.offset - end) // 4), dtype=mx.uint32), words]
        end = part.offset + part.nbytes
    return mx.concatenate([*columns, mx.zeros((len(rows), (layout.stride - end) // 4), dtype=mx.uint32)], axis=1)
