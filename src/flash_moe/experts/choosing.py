"""Chooses the faster streaming store: measures each file system once and stores the result."""

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
SECONDS = 0.25  # seconds after the first round, which compiles, when measuring stops; one fetch may still be running
_ROUNDS = 4  # fetches per store, first with an empty and then with a full page cache; fewer would not fill the slots
_RECORDS = 4  # maximum bytes of a fetch, so that a slow disk has time for several
_CLEARLY = 0.9  # the other store is chosen only if it takes less than this share of the time of the usual one
_FILE, _VERSION, _REMEMBERED = "expert_io.json", 1, 64  # entries in the file of the user's cache folder


class Timing(NamedTuple):
    """The seconds that the same work took with each store."""

    mapped: float
    slots: float


class Work(Protocol):
    """The work of a token on the records of some experts, including the fetch. ``name`` names the kind of work."""

    name: str

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None: ...


class Copying:
    """Work that copies the records on the device."""

    name = "copies"

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None:
        records = store.fetch(layer, experts)
        stacked = records.stacked()
        records.used_by(stacked)
        mx.eval(stacked)


class Reading:
    """Work that reads the records once in place, as the CPU kernels do."""

    name = "in place"

    def __call__(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> None:
        for record in store.fetch_bytes(layer, experts):
            record.view(np.uint64).sum()


Measure = Callable[[RecordTable, int], Timing | None]
_known: dict[tuple[Path, str], Streaming] = {}  # results by file and key, in case the file cannot be written


def choose(
    table: RecordTable,
    experts_per_token: int,
    measure: Measure | None = None,
    work: Work | None = None,
    by_part: bool = False,
) -> Streaming:
    """Returns the store for a packed checkpoint: from ``FLASH_MOE_EXPERT_IO``, from a stored result, or from a new
    measurement.

    If the measurement fails, it returns the usual choice: mapped on Metal, where mapped pages are used without a copy,
    and slots elsewhere. Failures to measure, or to store or load results, are only logged.

    Args:
        measure: replaces :func:`measure_stores`.
        work: the work on the records; None copies them.
        by_part: as in :class:`~flash_moe.experts.slots.SlotStore`.

    Raises:
        ArgumentError: the variable does not name a streaming store.
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
    """Times the work of decoding with both stores in turn, each time first from the disk and then from the page cache.

    Args:
        work, by_part: as in :func:`choose`.

    Returns:
        The seconds of each store; None if the time ran out before both stores were timed.

    Raises:
        ExpertReadError: a record cannot be read.
    """
    deadline = float("inf")
    count = min(experts_per_token, _RECORDS, *(len(table.experts(layer)) for layer in table.layouts))
    reader = RecordReader(table)  # shared by both stores: pages in another mapping could not be dropped
    try:
        stores = MappedStore(reader, count), SlotStore(reader, count, by_part=by_part)
        work = work or Copying()
        mapped = slots = 0.0
        fetches = product((True, False), _sample(table, count))
        for number, (cold, (layer, experts)) in enumerate(fetches):
            first, second = (_seconds(work, store, reader, layer, experts, cold) for store in stores)
            if number and first is not None and second is not None:  # not the first, which starts threads and compiles
                mapped, slots = mapped + first, slots + second
            if not number:
                deadline = time.perf_counter() + SECONDS
            elif time.perf_counter() > deadline:
                break
    finally:
        reader.close()
    return Timing(mapped, slots) if mapped and slots else None


def _sample(table: RecordTable, count: int) -> list[tuple[int, list[int]]]:
    """Returns the layer and the experts of each fetch, spread over the checkpoint, without repeated records if
    possible.
    """
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
    """Returns the seconds of the work; None if it should have been cold, but the page cache kept the records."""
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
    """Returns the key of a stored result: file system, form of the checkpoint, device and kind of work."""
    device = table.files[0].stat().st_dev
    return f"file system {device}, packed records of {table.max_stride} bytes, {mx.default_device()}, {work}"
