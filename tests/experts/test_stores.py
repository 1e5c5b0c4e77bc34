from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import Disk, Source, output_bytes, record_bytes, use

from flash_moe import ExpertReadError
from flash_moe.errors import ArgumentError
from flash_moe.experts.files import PAGE, MappedFile
from flash_moe.experts.opening import ExpertIO, open_store
from flash_moe.experts.store import ExpertStore

K = 4
STRIDE = 16384  # of a record of the packed and the stacked checkpoint
CASES: dict[str, tuple[str, ExpertIO, int]] = {
    "mapped, packed": ("packed", "mapped", 0),
    "mapped, stacked": ("stacked", "mapped", 0),
    "mapped, fused": ("fused", "mapped", 0),
    "slots, packed": ("packed", "slots", 0),
    "slots, stacked": ("stacked", "slots", 0),
    "slots, fused": ("fused", "slots", 0),
    "slots, separate": ("separate", "slots", 0),
    "cached slots, packed": ("packed", "slots", 6 * STRIDE),
    "cached slots, stacked": ("stacked", "slots", 6 * STRIDE),
    "resident, packed": ("packed", "resident", 0),
    "resident, separate": ("separate", "resident", 0),
}
STREAMING = {name: case for name, case in CASES.items() if case[1] != "resident"}

every_case = pytest.mark.parametrize(("form", "io", "cache"), CASES.values(), ids=CASES)
every_streaming_case = pytest.mark.parametrize(("form", "io", "cache"), STREAMING.values(), ids=STREAMING)
pytestmark = pytest.mark.usefixtures("small_groups")

experts = st.lists(st.integers(0, 15), min_size=1, max_size=K, unique=True)
steps = st.lists(
    st.tuples(st.sampled_from(["fetch", "use", "prefetch"]), st.integers(0, 3), experts), min_size=1, max_size=25
)
examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opened(source: Source, io: ExpertIO, cache: int = 0) -> ExpertStore:
    return open_store(source.table, io, K, cache)


@every_case
@given(steps=steps)
@examples
def test_any_sequence_gives_the_bytes_of_the_files(
    sources: dict[str, Source],
    form: str,
    io: ExpertIO,
    cache: int,
    reading: str,
    steps: list[tuple[Literal["fetch", "use", "prefetch"], int, list[int]]],
) -> None:
    """Outputs stay unevaluated until the end: a slot overwritten under one of them would show."""
    source = sources[form]
    store = opened(source, io, cache)
    outputs, fetched = [], 0
    for kind, layer, ids in steps:
        if kind == "prefetch":
            store.prefetch(layer, ids)
            continue
        records = store.fetch(layer, ids)
        expected = [source.records[layer, expert] for expert in ids]
        fetched += len(ids)
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


PACKED_STREAMS: dict[str, tuple[ExpertIO, int]] = {
    "mapped": ("mapped", 0), "slots": ("slots", 0), "cached slots": ("slots", 6 * STRIDE)
}  # fmt: skip


@pytest.mark.parametrize(("io", "cache"), PACKED_STREAMS.values(), ids=PACKED_STREAMS)
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


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@every_streaming_case
@pytest.mark.parametrize("change", [truncate, empty, overwrite])
@pytest.mark.parametrize("prefetch", [False, True], ids=["fetch", "prefetch first"])
def test_file_that_changed_since_it_was_opened(
    sources: dict[str, Source],
    form: str,
    io: ExpertIO,
    cache: int,
    tmp_path: Path,
    change: Callable[[Path], None],
    prefetch: bool,
) -> None:
    """Never a signal, never other bytes: an error that says what happened."""
    source = Source(Path(shutil.copytree(sources[form].folder, tmp_path / form)), sources[form].records)
    files = {extent.file for layer in range(4) for extent in source.table.extents(layer, 0)}
    for file in files:
        os.utime(file, ns=(0, 0))  # the clock of file systems is coarse
    store = opened(source, io, cache)
    for layer in range(4):
        assert record_bytes(store.fetch(layer, [0])) == [source.records[layer, 0]]
    for file in files:
        change(file)
    if prefetch:
        store.prefetch(1, [12, 13])
    with pytest.raises(ExpertReadError, match=r"load the model again") as caught:
        store.fetch(1, [12, 13])
    assert (caught.value.layer, caught.value.expert) == (1, 12)
    assert caught.value.file in map(str, files)
    store.close()


@pytest.mark.parametrize("form", ["packed", "stacked"])
def test_resident_store_needs_no_files(sources: dict[str, Source], tmp_path: Path, form: str) -> None:
    source = Source(Path(shutil.copytree(sources[form].folder, tmp_path / form)), sources[form].records)
    store = opened(source, "resident")
    shutil.rmtree(source.folder)
    for (layer, expert), record in source.records.items():
        assert record_bytes(store.fetch(layer, [expert])) == [record]


def evict_from_page_cache(folder: Path) -> None:
    """Drops a folder's files from the page cache; skips the test where the system does not do so."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file = MappedFile(path)
        dropped = file.absent(0, path.stat().st_size).all()
        file.close()
        if not dropped:
            pytest.skip("this file system keeps its pages")


@pytest.mark.parametrize(("io", "cache"), PACKED_STREAMS.values(), ids=PACKED_STREAMS)
@pytest.mark.parametrize("first", ["fetch", "prefetch"])
def test_missing_bytes_are_those_outside_the_page_cache(
    sources: dict[str, Source], tmp_path: Path, io: ExpertIO, cache: int, first: str
) -> None:
    source = Source(Path(shutil.copytree(sources["packed"].folder, tmp_path / "packed")), sources["packed"].records)
    table = source.table
    evict_from_page_cache(source.folder)
    store = open_store(table, io, K, cache)
    if first == "prefetch":
        store.prefetch(2, [5])
    store.fetch(2, [5])
    assert store.stats.bytes_missing == STRIDE
    store.fetch(2, [5])
    assert store.stats.bytes_missing == STRIDE  # now it is in memory
    assert store.stats.bytes_requested == 2 * STRIDE
    for layer in range(4):
        for expert in range(16):
            store.fetch(layer, [expert])
    assert store.stats.bytes_missing <= 64 * STRIDE
    store.close()
    warm = open_store(table, io, K, cache)
    for layer in range(4):
        warm.fetch(layer, [0, 5, 10, 15])
    assert warm.stats.bytes_missing == 0
    warm.close()


@pytest.mark.parametrize(("io", "cache"), PACKED_STREAMS.values(), ids=PACKED_STREAMS)
def test_what_is_in_memory_and_what_was_read_in_vain(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["packed"]
    cold = {source.table.extents(1, expert)[0].offset: expert for expert in range(16)}

    def absent(self: MappedFile, offset: int, nbytes: int) -> np.ndarray:
        return np.full(-(-nbytes // PAGE), offset in cold)

    def warm(*ids: int) -> None:
        for offset in [offset for offset, expert in cold.items() if expert in ids]:
            del cold[offset]

    monkeypatch.setattr(MappedFile, "absent", absent)
    store = opened(source, io, cache)
    assert store.in_memory(1, [3, 9, 12]) == [False] * 3
    store.fetch(1, [3])
    warm(3)
    store.prefetch(1, [9, 12])
    assert store.in_memory(1, [12, 3, 5, 9, 3]) == [True, True, False, True, True]  # there or on their way
    assert (store.stats.bytes_missing, store.stats.bytes_unused) == (STRIDE, 0)
    assert record_bytes(store.fetch(1, [3, 9])) == [source.records[1, 3], source.records[1, 9]]
    assert (store.stats.bytes_missing, store.stats.bytes_unused) == (2 * STRIDE, STRIDE)
    warm(9, 12)
    assert store.in_memory(1, [12, 9, 8]) == [True, True, False]
    assert record_bytes(store.fetch(1, [12])) == [source.records[1, 12]]
    assert (store.stats.bytes_missing, store.stats.bytes_unused) == (2 * STRIDE, STRIDE)
    assert store.stats.bytes_requested == 4 * STRIDE
    store.close()


@every_case
def test_records_of_a_file_that_changed_are_nowhere(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, tmp_path: Path
) -> None:
    """A store that holds everything needs no file; the others must not promise what they cannot fetch."""
    source = Source(Path(shutil.copytree(sources[form].folder, tmp_path / form)), sources[form].records)
    files = {extent.file for extent in source.table.extents(0, 0)}
    for file in files:
        os.utime(file, ns=(0, 0))
    store = opened(source, io, cache)
    store.fetch(0, [0])
    for file in files:
        overwrite(file)
    if store.holds_everything:
        assert store.in_memory(0, [1, 2]) == [True, True]
    else:
        with pytest.raises(ExpertReadError, match="load the model again"):
            store.in_memory(0, [1, 2])
    store.close()


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("reading", ["threads"], indirect=True)
def test_predictions_that_never_come_true_are_forgotten(sources: dict[str, Source], reading: str) -> None:
    """Reads that nobody waits for must not pile up."""
    stores = [opened(sources["packed"], "mapped"), opened(sources["packed"], "slots", 6 * STRIDE)]
    for number in range(200):
        for store in stores:
            layer = number % 4
            store.prefetch(layer, [number % 16, (number + 5) % 16])
            use(store.fetch(layer, [(number + 7) % 16]))
    mapped, slots = stores
    assert not any(mapped._warming.values())
    assert len(slots._reading) <= 14  # slots
    for store in stores:
        assert not store._missing
        assert store.stats.bytes_missing + store.stats.bytes_unused > 0
        store.close()


def test_resident_store_counts_what_it_had_to_read(sources: dict[str, Source], tmp_path: Path) -> None:
    source = Source(Path(shutil.copytree(sources["packed"].folder, tmp_path / "packed")), sources["packed"].records)
    table = source.table
    evict_from_page_cache(source.folder)
    cold = open_store(table, "resident", K)
    assert cold.stats.bytes_missing == 64 * STRIDE
    assert open_store(table, "resident", K).stats.bytes_missing == 0
    cold.fetch(0, [1, 2])
    assert (cold.stats.bytes_requested, cold.stats.bytes_missing) == (2 * STRIDE, 64 * STRIDE)


@every_streaming_case
def test_more_records_than_fit(sources: dict[str, Source], form: str, io: ExpertIO, cache: int) -> None:
    store = opened(sources[form], io, cache)
    assert store.capacity == K
    with pytest.raises(ArgumentError, match=r"5 records of layer 0 at once, but this store holds 4"):
        store.fetch(0, range(5))
    assert record_bytes(store.fetch(0, range(4))) == [sources[form].records[0, expert] for expert in range(4)]
    store.close()


@pytest.mark.parametrize(("io", "cache"), PACKED_STREAMS.values(), ids=PACKED_STREAMS)
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


def descriptors() -> int:
    gc.collect()  # a mapping keeps a descriptor of its own
    return len(os.listdir("/dev/fd"))  # noqa: PTH208


@every_case
def test_close_releases_files_and_threads(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str
) -> None:
    before, threads = descriptors(), set(threading.enumerate())
    store = opened(sources[form], io, cache)
    for layer in range(4):
        store.prefetch(layer, [1])
        store.fetch(layer, [0])
    store.close()
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads
    store.close()  # again is harmless


@every_streaming_case
def test_closed_store_reads_nothing(sources: dict[str, Source], form: str, io: ExpertIO, cache: int) -> None:
    store = opened(sources[form], io, cache)
    store.fetch(0, [0])
    store.close()
    with pytest.raises(ExpertReadError, match="closed"):
        store.fetch(0, [1])


def test_failed_opening_leaves_nothing_open(sources: dict[str, Source], disk: Disk) -> None:
    (extent,) = sources["packed"].table.extents(1, 7)
    disk.fail(extent.file, extent.offset, extent.nbytes)
    before, threads = descriptors(), set(threading.enumerate())
    with pytest.raises(ExpertReadError, match="expert 7 of layer 1"):
        opened(sources["packed"], "resident")
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads
