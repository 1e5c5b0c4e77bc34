"""Opens the expert store that ``expert_io`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from ..checkpoint.records import RecordTable
from ..errors import ArgumentError
from ..limits import memory_limit
from .choosing import Measure, Work, choose
from .mapped import MappedStore
from .reader import RecordReader
from .resident import ResidentStore
from .slots import SlotStore
from .store import ExpertStore

ExpertIO = Literal["auto", "mapped", "slots", "resident"]
_GROUP_BYTES = 128 << 20  # bytes of the records of one fetch in prefill, if memory allows
_SHARE = 32  # share of the memory that these records may take; slots hold two such groups


def check_io(expert_io: ExpertIO, cache_bytes: int) -> None:
    """Checks arguments of :func:`open_store`, and raises ArgumentError if they are invalid."""
    if expert_io not in get_args(ExpertIO):
        raise ArgumentError(f"expert_io is {expert_io!r}, expected one of {', '.join(get_args(ExpertIO))}")
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 0:
        raise ArgumentError(f"expert_cache is {cache_bytes!r}, expected a number of bytes, 0 or more")
    if cache_bytes and expert_io in ("mapped", "resident"):
        raise ArgumentError(f"expert_cache needs expert_io='slots' (or 'auto'), not {expert_io!r}")


def held_bytes(table: RecordTable, expert_io: ExpertIO, experts_per_token: int, cache_bytes: int) -> int:
    """Returns the minimum bytes of records that a store holds. Raises the errors of :func:`check_io`."""
    check_io(expert_io, cache_bytes)
    if expert_io == "resident":
        return table.nbytes
    return min(table.nbytes, experts_per_token * table.max_stride + cache_bytes)


def open_store(
    table: RecordTable,
    expert_io: ExpertIO,
    experts_per_token: int,
    cache_bytes: int = 0,
    progress: Callable[[int], None] | None = None,
    measure: Measure | None = None,
    by_part: bool = False,
    work: Work | None = None,
) -> ExpertStore:
    """Opens the store for a checkpoint's records.

    For packed checkpoints, ``"auto"`` takes the store that :func:`~flash_moe.experts.choosing.choose` finds faster.
    Records of other checkpoints have several extents, which slots combine during the read, so ``"auto"`` takes slots.
    An ``expert_cache`` also needs slots.

    Args:
        by_part: whether banks keep one array per part.
        measure: replaces the measurement of ``"auto"``. work: the work that is timed, see
            :func:`~flash_moe.experts.choosing.choose`.

    Raises:
        ArgumentError: ``expert_io`` is unknown, or does not support a cache.
        CheckpointError: with ``"mapped"``, a file cannot be mapped or has changed; with ``"resident"``, a file cannot
            be read.
    """
    check_io(expert_io, cache_bytes)
    if expert_io == "auto":
        expert_io = (
            choose(table, experts_per_token, measure, work, by_part) if table.packed and not cache_bytes else "slots"
        )
    reader = RecordReader(table)
    if expert_io == "resident":
        return ResidentStore(reader, progress, by_part=by_part)
    capacity = fetch_capacity(table, experts_per_token)
    if expert_io == "mapped":
        return MappedStore(reader, capacity)
    return SlotStore(reader, capacity, cache_bytes, by_part=by_part)


def fetch_capacity(table: RecordTable, experts_per_token: int) -> int:
    """Returns the maximum number of records in one fetch of a streaming store: at least K, or a group of prefill."""
    group = min(_GROUP_BYTES, memory_limit() // _SHARE)
    return min(max(group // max(table.max_stride, 1), experts_per_token), table.num_experts)
