"""The resident store: all records in memory. It is for models that fit, and the oracle for the other stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..closing import UntilClosed
from .banks import Bank, counts_by_part, make_bank
from .reader import RecordReader
from .store import ExpertStore


class ResidentStore(ExpertStore):
    """Holds one bank per layer, with all experts of the table, which is read once.

    Args:
        progress: function that is called after each layer with the bytes read so far.
        by_part: as in :class:`~flash_moe.experts.slots.SlotStore`.
    """

    can_evict, holds_everything = False, True
    _banks = UntilClosed[dict[int, Bank]]()

    def __init__(
        self, reader: RecordReader, progress: Callable[[int], None] | None = None, *, by_part: bool = False
    ) -> None:
        table = reader.table
        super().__init__(table.layouts, table.num_experts)
        self.by_part = by_part and counts_by_part(table.num_experts, list(table.layouts.values()))
        self._banks, self._share = {}, table.share
        try:
            self._read_all(reader, progress)
        finally:
            reader.close()

    def _read_all(self, reader: RecordReader, progress: Callable[[int], None] | None) -> None:
        table, done = reader.table, 0
        for layer, layout in table.layouts.items():
            experts = table.experts(layer)
            bank = make_bank(len(experts), [layout], self.by_part)
            missing = sum(reader.locate(layer, expert).missing_bytes() for expert in experts)
            for stats in self._counters(layer):
                stats.bytes_loaded += layout.stride * len(experts)
                stats.bytes_missing += missing
            reader.read_all(layer, experts, [bank.targets(place) for place in range(len(experts))])
            self._banks[layer] = bank.bank
            done += layout.stride * len(experts)
            if progress is not None:
                progress(done)

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[int]:
        return map(self._share.place, experts)

    def _bank_of(self, layer: int) -> Bank:
        return self._banks[layer]

    def _whole(self, layer: int) -> Bank | None:
        return self._banks[layer] if self._share.is_whole else None

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        return [True] * len(experts)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Does nothing, because all records are in memory."""

    def close(self) -> None:
        del self._banks
