"""The slot store: reads records into a persistent bank of MLX memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress

import mlx.core as mx
import numpy as np

from ..checkpoint.records import RecordTable
from ..closing import UntilClosed, take
from ..errors import Cancelled, ExpertReadError
from .banks import Bank, PartBank, RecordBank, counts_by_part, make_bank
from .host_memory import keep_on_host
from .lru import LruSlots
from .read_queue import Reads
from .reader import RecordReader
from .slot_tables import SlotTables
from .store import ExpertStore

_Key = tuple[int, int]  # layer, expert


def slot_count(table: RecordTable, capacity: int, cache_bytes: int = 0) -> int:
    """Returns the number of slots of a :class:`SlotStore` with these arguments."""
    return min(2 * capacity + cache_bytes // max(table.max_stride, 1), table.count)


class SlotStore(ExpertStore):
    """A bank of slots that ``preadv`` fills in place. The least recently used record is replaced first.

    The bank holds two fetches of ``capacity`` records, so that one can be read while the other is used. If there is
    room for every record, each has its own slot, and loaded layers stay fully resident.

    On CUDA, a bank that keeps no records between fetches stays on the host, because each record is written once and
    read once. The pages of a bank that keeps records may move to the device.

    Args:
        cache_bytes: bytes for further records, in addition to those of the current fetches.
        by_part: whether to keep one array per part, see :func:`~flash_moe.experts.banks.can_lie_by_part`.
    """

    copies = True
    _reader = UntilClosed[RecordReader]()
    _bank = UntilClosed[RecordBank | PartBank]()
    _whole_layers = UntilClosed[dict[int, Bank]]()
    _readers = UntilClosed[dict[int, mx.array]]()  # the last output computed from each slot

    def __init__(self, reader: RecordReader, capacity: int, cache_bytes: int = 0, *, by_part: bool = False) -> None:
        super().__init__(reader.table.layouts, capacity)
        self._reader = reader
        everything, count = reader.table.count, slot_count(reader.table, capacity, cache_bytes)
        layouts = list(self.layouts.values())
        self.by_part, self._count = by_part and counts_by_part(count, layouts), count
        self._bank = make_bank(count, layouts, self.by_part)
        if not cache_bytes and count < everything:
            for memory in self._bank.memory:
                keep_on_host(memory)
        self.keeps_experts = cache_bytes > 0
        self._tables = SlotTables(list(self.layouts), reader.table.num_experts) if self.keeps_experts else None
        self._slots: LruSlots[_Key] = LruSlots(count, self._unload)
        self._experts = reader.table.num_experts
        self._first_slots = (
            {layer: i * self._experts for i, layer in enumerate(self.layouts)}
            if count == everything and reader.table.share.is_whole
            else {}
        )
        self._held: dict[int, set[int]] = {layer: set() for layer in self._first_slots}
        self._whole_layers = {}
        self._reading: dict[int, Reads] = {}  # the reads that fill each slot
        self._readers = {}

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[int]:
        return self._find(layer, experts, self._start([(layer, expert) for expert in experts]))

    def _find(self, layer: int, experts: Sequence[int], begun: Collection[_Key]) -> Iterator[int]:
        for expert in experts:
            key = layer, expert
            try:
                self._finish(key)
            except (ExpertReadError, Cancelled):
                if key in begun:
                    raise
                self._check()
                # an earlier call began the read, perhaps when the disk was ill
                self._start([key], [(layer, other) for other in experts])
                self._finish(key)
            if self._tables is not None:
                self._tables.load(layer, expert, self._slots[key])
            yield self._slots[key]
        if layer in self._held:
            self._hold(layer, experts)

    def _bank_of(self, layer: int) -> Bank:
        return self._bank.bank

    def _used(self, found: Sequence[int], output: mx.array) -> None:
        mx.eval(*(self._readers.pop(row) for row in found if row in self._readers))  # only the last output is kept
        self._readers.update(dict.fromkeys(found, output))

    def _whole(self, layer: int) -> Bank | None:
        return self._whole_layers.get(layer)

    def ahead(self, layer: int) -> tuple[Bank, mx.array]:
        assert self._tables is not None
        return self._bank.bank, self._tables.of(layer)

    def _loaded_layers(self, layers: Sequence[int], ids: np.ndarray) -> int:
        assert self._tables is not None
        count = self._tables.loaded_layers(layers, ids)
        for layer, experts in zip(layers[:count], ids.tolist(), strict=False):
            for expert in experts:
                self._slots.touch((layer, expert))
        return count

    def _unload(self, key: _Key) -> None:
        if self._tables is not None:
            self._tables.unload(*key)

    def _hold(self, layer: int, experts: Sequence[int]) -> None:
        """Marks records as permanently loaded.

        When all experts of a layer are permanently loaded, the layer is fully resident.
        """
        held = self._held[layer]
        held.update(experts)
        if len(held) == self._experts:
            first = self._first_slots[layer]
            self._whole_layers[layer] = self._bank.rows(first, self._experts)
            mx.eval(self._whole_layers[layer])
            del self._held[layer]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        with suppress(ExpertReadError):  # the fetch that needs the record tries again and reports the error
            self._start([(layer, expert) for expert in experts[: self.capacity]])

    def _evict(self, flush: bool) -> None:
        for reads in self._reading.values():
            reads.stop()
        mx.eval(*self._readers.values())
        self._reading.clear()
        self._readers.clear()
        self._slots = LruSlots(self._count, self._unload)
        if self._tables is not None:
            self._tables.clear()
        self._held = {layer: set() for layer in self._first_slots}
        self._whole_layers.clear()
        self._reader.evict(flush=flush)

    def cached_bytes(self) -> int:
        return self._reader.cached_bytes()

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        return [(layer, e) in self._slots or self._reader.locate(layer, e).missing_bytes() == 0 for e in experts]

    def stop_if(self, cancelled: Callable[[], bool] | None) -> None:
        super().stop_if(cancelled)
        self._reader.stop_if(cancelled)

    def close(self) -> None:
        if (reader := take(self, "_reader")) is not None:
            reader.close()
        del self._bank, self._whole_layers, self._readers

    def _start(self, keys: Sequence[_Key], keep: Sequence[_Key] = ()) -> list[_Key]:
        """Assigns a slot to every key and starts to read the records that had no slot. Returns their keys."""
        new = [key for key in keys if self._slots.touch(key) is None]
        try:
            for key in new:
                self._begin(key, keep or keys)
        finally:
            self._reader.copy()
        return new

    def _begin(self, key: _Key, keep: Sequence[_Key]) -> None:
        """Assigns a slot to a key, without replacing the keys in ``keep``, and starts to read its record."""
        location = self._reader.locate(*key)
        place = self._first_slots[key[0]] + key[1] if self._first_slots else None
        slot = self._slots.assign(key, keep, place)
        try:
            self._reclaim(slot)
            self._reading[slot] = reads = self._reader.read(location, self._bank.targets(slot))
        except BaseException:
            self._slots.release(key)
            raise
        self._note(*key, reads)

    def _lost(self, layer: int, expert: int) -> None:
        if (layer, expert) in self._slots:
            self._slots.release((layer, expert))

    def _reclaim(self, slot: int) -> None:
        """Makes a slot safe to overwrite: waits for reads into it, and evaluates all outputs that use it."""
        if (reads := self._reading.get(slot)) is not None:
            reads.stop()  # an error matters only to a fetch of the previous record
            del self._reading[slot]
        if (output := self._readers.pop(slot, None)) is not None:
            mx.eval(output)

    def _finish(self, key: _Key) -> None:
        """Waits for a record. After an error or Ctrl-C, its slot is free, but reads into it may still be running."""
        slot = self._slots[key]
        if (reads := self._reading.get(slot)) is not None:
            try:
                reads.finish()
            except BaseException:
                self._slots.release(key)
                raise
            del self._reading[slot]
