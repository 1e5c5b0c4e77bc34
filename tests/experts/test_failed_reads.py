"""A read that fails is an error of the fetch that needs it, and of no other."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from store_cases import K, every_packed_stream, every_streaming_case, opened
from streaming import Disk, Source, record_bytes

from flash_moe import ExpertReadError
from flash_moe.experts.mapped_file import PAGE
from flash_moe.experts.opening import ExpertIO
from flash_moe.experts.read_queue import Reads

pytestmark = pytest.mark.usefixtures("small_groups")


@every_streaming_case
@pytest.mark.usefixtures("cold_cache")
def test_fetch_after_a_failed_read(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str, disk: Disk
) -> None:
    source = sources[form]
    store = opened(source, io, cache)
    extent = source.table.extents(1, 7)[-1]
    first = extent.offset // PAGE * PAGE  # the mapped store reads whole pages
    disk.fail(extent.file, first, extent.offset + extent.nbytes - first)
    for _ in range(3):
        with pytest.raises(ExpertReadError) as caught:
            store.fetch(1, [2, 7, 11])
        assert (caught.value.file, caught.value.layer) == (str(extent.file), 1)
    disk.heal()
    for ids in ([2, 7, 11], [7], [7, 0, 1, 2], [11, 2]):
        assert record_bytes(store.fetch(1, ids)) == [source.records[1, expert] for expert in ids]
    store.close()


@every_packed_stream
@pytest.mark.usefixtures("cold_cache")
class TestFailedPrefetch:
    """Packed records begin at pages, so that the failure of one touches no other."""

    @pytest.fixture
    def failing(self, sources: dict[str, Source], disk: Disk) -> Source:
        (extent,) = sources["packed"].table.extents(1, 7)
        disk.fail(extent.file, extent.offset, extent.nbytes)
        return sources["packed"]

    def test_shows_in_the_fetch_that_needs_it(
        self, failing: Source, io: ExpertIO, cache: int, reading: str, disk: Disk
    ) -> None:
        store = opened(failing, io, cache)
        store.prefetch(1, [6, 7, 8])
        for ids in ([6, 8], [5, 6], [8]):
            assert record_bytes(store.fetch(1, ids)) == [failing.records[1, expert] for expert in ids]
        with pytest.raises(ExpertReadError, match="Input/output error") as caught:
            store.fetch(1, [6, 7])
        assert (caught.value.layer, caught.value.expert) == (1, 7)
        disk.heal()
        assert record_bytes(store.fetch(1, [6, 7])) == [failing.records[1, 6], failing.records[1, 7]]
        store.close()

    def test_shows_nowhere_when_the_record_is_not_needed(
        self, failing: Source, io: ExpertIO, cache: int, reading: str, disk: Disk
    ) -> None:
        store = opened(failing, io, cache)
        store.prefetch(1, [7])
        for layer in (0, 2, 3):
            for first in range(0, 16, K):
                ids = range(first, first + K)
                assert record_bytes(store.fetch(layer, ids)) == [failing.records[layer, expert] for expert in ids]
        store.close()


@every_streaming_case
@pytest.mark.usefixtures("cold_cache")
def test_nothing_of_a_failure_stays_when_the_disk_is_well_again(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str, disk: Disk
) -> None:
    """All reads fail for a while: those of fetches, and those of prefetches that nobody has waited for yet."""

    def fail(path: str, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = sources[form]
    store = opened(source, io, cache)
    disk.fault = fail
    for layer in range(4):
        with pytest.raises(ExpertReadError):
            store.fetch(layer, [2, 7, 11])
        store.prefetch(layer, [5, 6])
    for _, reads, _ in [begun for layer in range(4) for begun in store._begun[layer]]:
        reads.wait()
    disk.heal()
    for ids in ([2, 5, 7], [6, 11], [0, 1]):
        for layer in range(4):
            assert record_bytes(store.fetch(layer, ids)) == [source.records[layer, expert] for expert in ids]
    store.close()


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("reading", ["threads"], indirect=True)
def test_reads_of_an_interrupted_fetch_write_into_no_other_record(
    sources: dict[str, Source], reading: str, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, go, interrupts = sources["packed"], threading.Event(), [KeyboardInterrupt]
    (late,) = source.table.extents(1, 0)

    def fault(path: str, offset: int) -> None:
        if (path, offset) == (str(late.file), late.offset):
            assert go.wait(10)

    def wait(self: Reads) -> None:
        if interrupts:
            raise interrupts.pop()
        real_wait(self)

    real_wait = Reads.wait
    monkeypatch.setattr(Reads, "wait", wait)
    disk.fault = fault
    store = opened(source, "slots")
    with pytest.raises(KeyboardInterrupt):
        store.fetch(1, [0, 1])
    timer = threading.Timer(0.1, go.set)
    timer.start()
    held = store.fetch(1, [2, 3, 4, 5])
    timer.join()
    time.sleep(0.05)
    assert record_bytes(held) == [source.records[1, expert] for expert in (2, 3, 4, 5)]
    assert record_bytes(store.fetch(1, [0, 1])) == [source.records[1, 0], source.records[1, 1]]
    store.close()
