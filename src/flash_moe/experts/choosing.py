"""Chooses the faster streaming store: measures each file system once, then remembers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import mlx.core as mx
import numpy as np

from ..checkpoint.records import RecordTable
from ..errors import ArgumentError, ExpertReadError
from ..user_cache import cache_file, recall, remember
from .mapped import MappedStore
from .mapped_file import UnmappableError
from .reader import RecordReader
from .slots import SlotStore
from .store import ExpertStore

logger = logging.getLogger(__name__)

Streaming = Literal["mapped", "slots"]
VARIABLE = "FLASH_MOE_EXPERT_IO"
SECONDS = 0.25  # after the first round, which compiles, when measuring stops; one fetch may still be under way
_ROUNDS = 4  # fetches by each store, with the page cache empty and again with it full; fewer would find full slots
_RECORDS = 4  # of a fetch at the most, so that a slow disk has time for several
_CLEARLY = 0.9  # the usual choice is left where the other takes less than this share of its time
_FILE, _VERSION, _REMEMBERED = "expert_io.json", 1, 64  # entries in the file of the user's cache folder


class Timing(NamedTuple):
    """Seconds that the same work took with each store."""

    mapped: float
    slots: float


class Work(Protocol):
    """What a token does with the records of some experts, fetching included; ``name`` says which kind of work it is."""

    name: str

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None: ...


class Copying:
    """Has the device copy the records."""

    name = "copies"

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None:
        records = store.fetch(layer, experts)
        stacked = records.stacked()
        records.used_by(stacked)
        mx.eval(stacked)


class Reading:
    """Reads the records once where they lie, as the kernels of the CPU do."""

    name = "in place"

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None:
        for record in store.fetch_bytes(layer, experts):
            record.view(np.uint64).sum()


Measure = Callable[[RecordTable, int], Timing | None]
_known: dict[tuple[Path, str], Streaming] = {}  # by file and key, where the file cannot be written


def choose(
    table: RecordTable,
    experts_per_token: int,
    measure: Measure | None = None,
    work: Work | None = None,
    by_part: bool = False,
) -> Streaming:
    """Returns the store for a packed checkpoint: what ``FLASH_MOE_EXPERT_IO`` says, what was remembered, or what is
    faster.

    Without a measurement it is the usual choice: mapped on Metal, where mapped pages are used without a copy, and
    slots elsewhere. Failures to measure, to remember and to recall are logged and cost nothing but that.

    Args:
        measure: stands in for :func:`measure_stores`.
        work: what is done with the records; they are copied by default.
        by_part: as in :class:`~flash_moe.experts.slots.SlotStore`.

    Raises:
        ArgumentError: the variable names no streaming store.
    """
    if forced := os.environ.get(VARIABLE):
        if forced not in get_args(Streaming):
            raise ArgumentError(f"{VARIABLE} is {forced!r}, expected one of {', '.join(get_args(Streaming))}, or unset")
        return forced  # type: ignore[return-value]
    usual: Streaming = "mapped" if mx.metal.is_available() else "slots"
    try:
        work = work or Copying()
        key = _key(table, work.name)
        known: Any = _known.get((cache_file(_FILE), key)) or recall(_FILE, _VERSION).get(key)
        if known in get_args(Streaming):
            return known
        timing = (measure or partial(measure_stores, work=work, by_part=by_part))(table, experts_per_token)
    except UnmappableError as error:
        logger.info("expert_io='auto' is slots: %s", error)
        return "slots"
    except (ExpertReadError, OSError, RuntimeError) as error:
        logger.info("expert_io='auto' could not be measured, taking %s: %s", usual, error)
        return usual
    if timing is None:
        logger.info("expert_io='auto' could not be measured within %s s, taking %s", SECONDS, usual)
        return usual
    other: Streaming = "slots" if usual == "mapped" else "mapped"
    choice = other if getattr(timing, other) < _CLEARLY * getattr(timing, usual) else usual
    logger.info("expert_io='auto' is %s: mapped took %.4f s, slots %.4f s", choice, *timing)
    _known[cache_file(_FILE), key] = choice
    remember(_FILE, _VERSION, key, lambda _: choice, _REMEMBERED)
    return choice


def measure_stores(
    table: RecordTable, experts_per_token: int, work: Work | None = None, by_part: bool = False
) -> Timing | None:
    """Works as decoding does, each time from the disk and then from the page cache, through both stores in turn.

    Args:
        work, by_part: as of :func:`choose`.

    Returns:
        None where time ran out before there was anything to compare.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    deadline = float("inf")
    count = min(experts_per_token, _RECORDS, *(len(table.experts(layer)) for layer in table.layouts))
    reader = RecordReader(table)  # one for both: pages that another mapping holds could not be dropped
    try:
        stores = MappedStore(reader, count), SlotStore(reader, count, by_part=by_part)
        work = work or Copying()
        mapped = slots = 0.0
        fetches = product((True, False), _sample(table, count))
        for number, (cold, (layer, experts)) in enumerate(fetches):
            first, second = (_seconds(work, store, reader, layer, experts, cold) for store in stores)
            if number and first is not None and second is not None:  # the first fetches start threads and compile
                mapped, slots = mapped + first, slots + second
            if not number:
                deadline = time.perf_counter() + SECONDS
            elif time.perf_counter() > deadline:
                break
    finally:
        reader.close()
    return Timing(mapped, slots) if mapped and slots else None


def _sample(table: RecordTable, count: int) -> list[tuple[int, list[int]]]:
    """Returns layer and experts of each fetch, spread over the checkpoint; never a record twice where there are enough."""
    layers = list(table.layouts)
    found = []
    for i in range(_ROUNDS):
        layer = layers[i * len(layers) // _ROUNDS]
        experts = table.experts(layer)
        found.append((layer, [experts[(i * count + j) % len(experts)] for j in range(count)]))
    return found


def _seconds(
    work: Work, store: ExpertStore, reader: RecordReader, layer: int, experts: Sequence[int], cold: bool
) -> float | None:
    """Returns seconds of the work; None where it should have been cold and the page cache kept the records."""
    locations = [reader.locate(layer, expert) for expert in experts]
    as_wanted = True
    if cold:
        for location in locations:
            location.evict()
        as_wanted = all(location.missing_bytes() == location.nbytes for location in locations)
    start = time.perf_counter()
    work(store, layer, experts)
    return time.perf_counter() - start if as_wanted else None


def _key(table: RecordTable, work: str) -> str:
    """Returns file system, form of the checkpoint, device and kind of work."""
    device = table.files[0].stat().st_dev
    return f"file system {device}, packed records of {table.max_stride} bytes, {mx.default_device()}, {work}"
