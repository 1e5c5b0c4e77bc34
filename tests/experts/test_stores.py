"""A store hands out the bytes of the files: after any calls, in any order, however few slots there are."""

from __future__ import annotations

import time
from typing import Literal

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_cases import STRIDE, K, every_case, every_packed_stream, every_streaming_case, opened
from streaming import Disk, Source, output_bytes, record_bytes, use

from flash_moe.errors import ArgumentError
from flash_moe.experts.opening import ExpertIO

pytestmark = pytest.mark.usefixtures("small_groups")

experts = st.lists(st.integers(0, 15), min_size=1, max_size=K, unique=True)
steps = st.lists(
    st.tuples(st.sampled_from(["fetch", "each", "use", "prefetch"]), st.integers(0, 3), experts),
    min_size=1,
    max_size=25,
)
examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_case
@given(steps=steps)
@examples
def test_any_sequence_gives_the_bytes_of_the_files(
    sources: dict[str, Source],
    form: str,
    io: ExpertIO,
    cache: int,
    reading: str,
    steps: list[tuple[Literal["fetch", "each", "use", "prefetch"], int, list[int]]],
) -> None:
    """Outputs stay unevaluated until the end: a slot overwritten under one of them would show."""
    source = sources[form]
    store = opened(source, io, cache)
    outputs, fetched = [], 0
    for kind, layer, ids in steps:
        if kind == "prefetch":
            store.prefetch(layer, ids)
            continue
        expected = [source.records[layer, expert] for expert in ids]
        fetched += len(ids)
        if kind == "each":
            arriving = store.fetch_each(layer, ids)
            output = mx.stack(list(arriving)) ^ 0
            arriving.used_by(output)
            outputs.append((output, expected))
            continue
        records = store.fetch(layer, ids)
        if kind == "fetch":
            assert record_bytes(records) == expected
        else:
            outputs.append((use(records), expected))
    for output, expected in outputs:
        assert output_bytes(output) == expected
    assert store.stats.fetches == sum(kind != "prefetch" for kind, _, _ in steps)
    assert store.stats.bytes_requested == fetched * store.layouts[0].stride
    store.close()


@every_streaming_case
def test_outputs_survive_the_eviction_of_their_records(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str
) -> None:
    source = sources[form]
    store = opened(source, io, cache)
    outputs = [(use(store.fetch(0, ids)), ids) for ids in ([0, 1, 2, 3], [3, 2, 1, 0], [3, 5], [1, 6])]
    for layer in (1, 2, 3):
        for first in range(0, 16, K):
            use(store.fetch(layer, range(first, first + K)))
    for output, ids in outputs:
        assert output_bytes(output) == [source.records[0, expert] for expert in ids]
    store.close()


@pytest.mark.parametrize("reading", ["threads"], indirect=True)
def test_slot_is_not_given_away_while_it_is_being_filled(sources: dict[str, Source], reading: str, disk: Disk) -> None:
    """A prefetch so slow that its slot is wanted for another record before it has ended."""
    source = sources["packed"]
    (slow,) = source.table.extents(0, 0)

    def fault(path: str, offset: int) -> None:
        if path == str(slow.file) and slow.offset <= offset < slow.offset + slow.nbytes:
            time.sleep(0.1)

    disk.fault = fault
    store = opened(source, "slots")
    store.prefetch(0, [0])
    groups = [range(first, first + K) for first in range(0, 12, K)]  # more than the 8 slots
    records = [store.fetch(1, ids) for ids in groups]
    store.close()  # waits for every read
    for held, ids in zip(records[1:], groups[1:], strict=True):
        assert record_bytes(held) == [source.records[1, expert] for expert in ids]


@every_streaming_case
def test_more_records_than_fit(sources: dict[str, Source], form: str, io: ExpertIO, cache: int) -> None:
    store = opened(sources[form], io, cache)
    assert store.capacity == K
    with pytest.raises(ArgumentError, match=r"5 records of layer 0 at once, but this store holds 4"):
        store.fetch(0, range(5))
    assert record_bytes(store.fetch(0, range(4))) == [sources[form].records[0, expert] for expert in range(4)]
    store.close()


@every_packed_stream
def test_prefetch_of_more_than_fits_is_harmless(sources: dict[str, Source], io: ExpertIO, cache: int) -> None:
    source = sources["packed"]
    store = opened(source, io, cache)
    store.prefetch(0, range(16))
    assert record_bytes(store.fetch(0, [12, 13, 14, 15])) == [source.records[0, expert] for expert in range(12, 16)]
    store.close()


def test_cached_records_are_not_read_again(sources: dict[str, Source], disk: Disk) -> None:
    store = opened(sources["packed"], "slots", 6 * STRIDE)  # 2 K + 6 slots
    for first in range(0, 14, 2):
        store.fetch(0, [first, first + 1])
    disk.calls.clear()
    for first in range(0, 14, 2):
        store.fetch(0, [first, first + 1])
    assert disk.calls == []
    store.fetch(0, [15])
    store.fetch(0, [0])  # was the least recently used
    assert len(disk.calls) == 2
    store.close()
