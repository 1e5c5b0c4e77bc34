"""Records that are handed out one by one, each as soon as it is there."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from store_cases import STRIDE, every_packed_stream, opened
from streaming import Disk, Source

from flash_moe.errors import ArgumentError, ExpertReadError
from flash_moe.experts.opening import ExpertIO
from flash_moe.experts.slots import SlotStore


@every_packed_stream
@pytest.mark.usefixtures("cold_cache")
def test_the_first_is_there_while_the_second_is_read(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, disk: Disk
) -> None:
    if reading == "inline":
        pytest.skip("small records are there before the fetch returns")
    source, go = sources["packed"], threading.Event()
    (held,) = source.table.extents(1, 9)

    def fault(path: str, offset: int) -> None:
        if path == str(held.file) and held.offset <= offset < held.offset + held.nbytes:
            assert go.wait(10)

    disk.fault = fault
    store = opened(source, io, cache)
    arriving = iter(store.fetch_each(1, [3, 9]))
    assert np.array(next(arriving)).tobytes() == source.records[1, 3]
    assert store.stats.fetches == 0, "it is counted when the last is there"
    go.set()
    assert np.array(next(arriving)).tobytes() == source.records[1, 9]
    assert next(arriving, None) is None
    assert (store.stats.fetches, store.stats.bytes_requested) == (1, 2 * store.layouts[1].stride)
    store.close()


@every_packed_stream
@pytest.mark.usefixtures("cold_cache")
def test_a_failed_read_shows_at_its_record(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, disk: Disk
) -> None:
    if reading == "inline":
        pytest.skip("small records are read before the first is handed out")
    source = sources["packed"]
    (extent,) = source.table.extents(1, 9)
    disk.fail(extent.file, extent.offset, extent.nbytes)
    store = opened(source, io, cache)
    arriving = iter(store.fetch_each(1, [3, 9]))
    assert np.array(next(arriving)).tobytes() == source.records[1, 3]
    with pytest.raises(ExpertReadError, match="Input/output error"):
        next(arriving)
    disk.heal()
    found = [np.array(record).tobytes() for record in store.fetch_each(1, [9, 3])]
    assert found == [source.records[1, 9], source.records[1, 3]]
    store.close()


def test_slots_hand_out_their_own_memory(sources: dict[str, Source]) -> None:
    store = opened(sources["packed"], "slots", 0)
    assert isinstance(store, SlotStore)
    (bank,) = store._bank.memory
    for record in store.fetch_each(2, [5, 1, 7]):
        inside = np.array(record, copy=False).ctypes.data - bank.ctypes.data
        assert 0 <= inside < bank.nbytes, "it was copied"
    store.close()


def test_more_than_the_store_holds_is_refused(sources: dict[str, Source]) -> None:
    store = opened(sources["packed"], "slots", 0)
    with pytest.raises(ArgumentError, match="ask for fewer"):
        list(store.fetch_each(0, range(store.capacity + 1)))
    store.close()


@every_packed_stream
@pytest.mark.usefixtures("cold_cache")
def test_what_is_begun_meanwhile_is_read_behind(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, disk: Disk
) -> None:
    if reading == "inline":
        pytest.skip("small records are there before anything can be done meanwhile")
    source, begun = sources["packed"], threading.Event()
    (first,) = source.table.extents(1, 9)

    def fault(path: str, offset: int) -> None:
        if (path, offset) == (str(first.file), first.offset):
            assert begun.wait(10), "the fetch waited for its own reads first"

    def meanwhile() -> None:
        store.prefetch(2, [4])
        begun.set()

    disk.fault = fault
    store = opened(source, io, cache)
    assert [np.array(record).tobytes() for record in store.fetch_each(1, [9], meanwhile)] == [source.records[1, 9]]
    assert [np.array(record).tobytes() for record in store.fetch_each(2, [4])] == [source.records[2, 4]]
    assert store.stats.bytes_loaded == store.stats.bytes_requested, "nothing is read twice"
    store.close()


@pytest.mark.parametrize("reading", ["threads"], indirect=True)
@pytest.mark.parametrize("cache", [0, 6 * STRIDE])
def test_what_the_page_cache_has_is_prefetched_while_nobody_waits(
    sources: dict[str, Source], cache: int, reading: str, disk: Disk
) -> None:
    store = opened(sources["packed"], "slots", cache)
    store.prefetch(2, [4, 7])
    deadline = time.monotonic() + 10
    while sum(count for _, count in disk.calls) < 2 * STRIDE and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sum(count for _, count in disk.calls) == 2 * STRIDE
    store.close()
