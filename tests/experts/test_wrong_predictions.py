"""What a prefetch expected and the fetch does not ask for is not read any more, if its reads have not begun."""

from __future__ import annotations

import threading
import time

import pytest
from store_cases import STRIDE, every_packed_stream, opened
from streaming import Disk, Source, record_bytes

from flash_moe.experts.mapped_file import PAGE
from flash_moe.experts.opening import ExpertIO

pytestmark = [
    pytest.mark.usefixtures("cold_cache"), pytest.mark.parametrize("reading", ["threads"], indirect=True)
]  # fmt: skip


@pytest.fixture
def go(disk: Disk) -> threading.Event:
    """Reads begin, and end when this is set."""
    go = threading.Event()

    def fault(path: str, offset: int) -> None:
        assert go.wait(10)

    disk.fault = fault
    return go


@pytest.fixture
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many requests, of one page each, are under way at once."""
    monkeypatch.setattr("flash_moe.experts.reader.IN_FLIGHT", request.param)
    return int(request.param)


def pages_read(source: Source, disk: Disk, layer: int, expert: int) -> int:
    """Of a record, from a file in which no other layer is."""
    (extent,) = source.table.extents(layer, expert)
    return sum(extent.offset <= offset < extent.offset + extent.nbytes for offset, _ in disk.calls)


@every_packed_stream
@pytest.mark.parametrize(
    ("threads", "begun"), [(4, 0), (6, 2), (8, 4)], ids=["none", "half", "all"], indirect=["threads"]
)
def test_reads_that_have_not_begun_are_given_up(
    sources: dict[str, Source], io: ExpertIO, cache: int, threads: int, begun: int, reading: str, disk: Disk,
    go: threading.Event,
) -> None:  # fmt: skip
    source = sources["packed"]
    store = opened(source, io, cache)
    store.prefetch(1, [0, 5])  # four reads each
    while len(store._reader._queue._disk.waiting) > 8 - threads:
        time.sleep(0.001)
    assert record_bytes(store.fetch(1, [0, 3], go.set)) == [source.records[1, 0], source.records[1, 3]]
    store.close()
    assert pages_read(source, disk, 1, 5) == begun
    assert store.stats.bytes_unused == begun * PAGE
    assert (store.stats.bytes_missing, store.stats.bytes_loaded) == (2 * STRIDE, 2 * STRIDE)


@every_packed_stream
@pytest.mark.parametrize("threads", [4, 6], indirect=True)
def test_what_was_given_up_is_read_when_it_is_needed(
    sources: dict[str, Source], io: ExpertIO, cache: int, threads: int, reading: str, go: threading.Event
) -> None:
    store = opened(sources["packed"], io, cache)
    store.prefetch(1, [0, 5, 6])
    store.fetch(1, [0, 3], go.set)
    assert store.in_memory(1, [6]) == [False]
    for experts in ([5, 6], [0, 5, 6, 3], [6, 7, 8]):
        assert record_bytes(store.fetch(1, experts)) == [sources["packed"].records[1, expert] for expert in experts]
    store.close()
