"""The speed of a store's fetches: from storage, and from the page cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
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
_FEWEST = 3  # fetches before time may run out; the first is not counted where there are more


@dataclass(frozen=True)
class FetchSpeed:
    """Bytes per second of fetches of ``records`` records each.

    Attributes:
        cold: from storage; None where the page cache could not be emptied.
        warm: from the page cache, from which the same records were read right before.
    """

    store: Streaming
    records: int
    cold: float | None
    warm: float


def fetch_speed(table: RecordTable, kind: Streaming, records: int, seconds: float) -> FetchSpeed:
    """Measures fetches of random records, none of which is in the store's own memory.

    Args:
        records: of one layer, in each fetch.
        seconds: after which no new fetch is begun; half for cold ones, half for warm ones.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    reader = RecordReader(table)
    store: ExpertStore = MappedStore(reader, records) if kind == "mapped" else SlotStore(reader, records)
    with closing(store):
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
        warm, _ = _timed(store, used, seconds / 2, lambda layer, experts: None)
    return FetchSpeed(kind, records, cold if emptied else None, warm)


def _sets(table: RecordTable, records: int) -> Iterator[tuple[int, list[int]]]:
    """Layer and experts of each fetch: every record once, in a random order."""
    rng = np.random.default_rng(0)
    layers = list(table.layouts)
    orders = {layer: rng.permutation(table.num_experts) for layer in layers}
    for start in range(0, table.num_experts - records + 1, records):
        for layer in rng.permutation(layers):
            yield int(layer), orders[layer][start : start + records].tolist()


def _timed(
    store: ExpertStore, sets: list[tuple[int, list[int]]], limit: float, prepare: Callable[[int, list[int]], None]
) -> tuple[float, list[tuple[int, list[int]]]]:
    """Returns bytes per second of the fetches that time allows, and which they were."""
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
    """Where the device copies mapped records into its own memory before it computes with them, waits for that, too."""
    if on_cuda() and records.rows is None:
        mx.eval(records.stacked())
