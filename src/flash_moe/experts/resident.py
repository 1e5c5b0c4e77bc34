"""All records in memory: for models that fit, and the oracle for the stores that stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..closing import UntilClosed
from .banks import Bank, make_bank
from .reader import RecordReader
from .store import ExpertStore


class ResidentStore(ExpertStore):
    """One bank per layer, read once.

    Args:
        progress: called with the bytes read so far after each layer.
        by_part: as in :class:`~flash_moe.experts.slots.SlotStore`.
    """

    can_evict, holds_everything = False, True
    _banks = UntilClosed[dict[int, Bank]]()

    def __init__(
        self, reader: RecordReader, progress: Callable[[int], None] | None = None, *, by_part: bool = False
    ) -> None:
        table, self.by_part = reader.table, by_part
        super().__init__(table.layouts, table.num_experts)
        self._banks = {}
        try:
            self._read_all(reader, progress)
        finally:
            reader.close()

    def _read_all(self, reader: RecordReader, progress: Callable[[int], None] | None) -> None:
        table, done = reader.table, 0
        for layer, layout in table.layouts.items():
            bank = make_bank(table.num_experts, [layout], self.by_part)
            experts = range(table.num_experts)
            missing = sum(reader.locate(layer, expert).missing_bytes() for expert in experts)
            for stats in self._counters(layer):
                stats.bytes_brought += layout.stride * table.num_experts
                stats.bytes_missing += missing
            reader.read_all(layer, experts, [bank.targets(expert) for expert in experts])
            self._banks[layer] = bank.bank
            done += layout.stride * table.num_experts
            if progress is not None:
                progress(done)

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[int]:
        return iter(experts)

    def _bank_of(self, layer: int) -> Bank:
        return self._banks[layer]

    def _whole(self, layer: int) -> Bank:
        return self._banks[layer]

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        return [True] * len(experts)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Everything is here already."""

    def close(self) -> None:
        del self._banks
