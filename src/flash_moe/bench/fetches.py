"""Measures the speed of a store's fetches, from the disk and from the page cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from ..checkpoint.records import RecordTable
from ..experts.host_memory import on_cuda
from ..experts.mapped import MappedStore
from ..experts.reader import RecordReader
from ..experts.slots import SlotStore
from ..experts.store import ExpertStore, Records

Streaming = Literal["mapped", "slots"]
_FEWEST = 3  # minimum number of fetches; the first is not counted if there are more


@dataclass(frozen=True)
class FetchSpeed:
    """The bytes per second of fetches of ``records`` records each.

    Attributes:
        cold: speed from the disk; None if the page cache could not be emptied.
        warm: speed from the page cache, with the same records again.
    """

    store: Streaming
    records: int
    cold: float | None
    warm: float


def fetch_speed(table: RecordTable, kind: Streaming, records: int, seconds: float) -> FetchSpeed:
    """Measures fetches of random records that are not in the store's own memory.

    Args:
        records: number of records of one layer in each fetch.
        seconds: time after which no new fetch begins; half for cold fetches and half for warm ones.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    reader = RecordReader(table)
    store: ExpertStore = MappedStore(reader, records) if kind == "mapped" else SlotStore(reader, records)
    with ExitStack() as stack:
        stack.enter_context(closing(store))
        emptied = True

        def empty(layer: int, experts: list[int]) -> None:
            nonlocal emptied
            locations = [reader.locate(layer, expert) for expert in experts]
            for location in locations:
                location.evict()
            emptied = emptied and all(location.missing_bytes() == location.nbytes for location in locations)

        reader.evict(flush=True)
        sets = list(_sets(table, records))
        cold, used = _timed(store, sets, seconds / 2, empty)
        if kind == "slots":  # the bank of the first may hold all records of a model of one or two layers
            store = stack.enter_context(closing(SlotStore(RecordReader(table), records)))
        warm, _ = _timed(store, used, seconds / 2, lambda layer, experts: None)
    return FetchSpeed(kind, records, cold if emptied else None, warm)


def _sets(table: RecordTable, records: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the layer and the experts of each fetch: every record once, in random order."""
    rng = np.random.default_rng(0)
    layers = list(table.layouts)
    orders = {layer: rng.permutation(table.num_experts) for layer in layers}
    for start in range(0, table.num_experts - records + 1, records):
        for layer in rng.permutation(layers):
            yield int(layer), orders[layer][start : start + records].tolist()


def _timed(
    store: ExpertStore, sets: list[tuple[int, list[int]]], limit: float, prepare: Callable[[int, list[int]], None]
) -> tuple[float, list[tuple[int, list[int]]]]:
    """Returns the bytes per second of the fetches within the time limit, and these fetches."""
    deadline = time.perf_counter() + limit
    speeds: list[tuple[int, float]] = []
    for done, (layer, experts) in enumerate(sets, start=1):
        prepare(layer, experts)
        before, start = store.stats.bytes_loaded, time.perf_counter()
        bring(store.fetch(layer, experts))
        speeds.append((store.stats.bytes_loaded - before, time.perf_counter() - start))
        if done >= _FEWEST and time.perf_counter() > deadline:
            break
    counted = speeds[1:] if len(speeds) > 1 else speeds
    return sum(n for n, _ in counted) / sum(s for _, s in counted), sets[: len(speeds)]


def bring(records: Records) -> None:
    """If the device copies mapped records into its own memory before it uses them, waits for these copies too."""
    if on_cuda() and records.rows is None:
        mx.eval(records.stacked())
