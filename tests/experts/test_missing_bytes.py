"""What a store says is in memory, and what it counts as missing and as read in vain."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from store_cases import STRIDE, K, every_packed_stream, every_streaming_case, opened
from streaming import Source, record_bytes, use

from flash_moe.experts.mapped_file import PAGE, MappedFile
from flash_moe.experts.opening import ExpertIO, open_store

pytestmark = pytest.mark.usefixtures("small_groups")


def evict_from_page_cache(folder: Path) -> None:
    """Drops a folder's files from the page cache; skips the test where the system does not do so."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file = MappedFile(path)
        dropped = file.missing_pages(0, path.stat().st_size).all()
        file.close()
        if not dropped:
            pytest.skip("this file system keeps its pages")


@every_packed_stream
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


@every_streaming_case
@pytest.mark.usefixtures("cold_cache")
def test_no_more_is_missing_than_a_record_has(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str
) -> None:
    """Also where its parts begin and end inside a page."""
    table = sources[form].table
    store = opened(sources[form], io, cache)
    store.fetch(1, [3, 9])
    assert store.stats.bytes_missing == sum(e.nbytes for expert in (3, 9) for e in table.extents(1, expert))
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


@every_packed_stream
def test_what_is_in_memory_and_what_was_read_in_vain(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["packed"]
    cold = {source.table.extents(1, expert)[0].offset: expert for expert in range(16)}

    def residency(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        there = not any(record <= offset < record + STRIDE for record in cold)
        return bytearray([there] * -(-nbytes // PAGE))

    def warm(*ids: int) -> None:
        for offset in [offset for offset, expert in cold.items() if expert in ids]:
            del cold[offset]

    monkeypatch.setattr(MappedFile, "residency", residency)
    store = opened(source, io, cache)
    assert store.in_memory(1, [3, 9, 12]) == [False] * 3
    store.fetch(1, [3])
    warm(3)
    store.prefetch(1, [9, 12])
    for _, reads, _ in store._begun[1]:
        reads.wait()  # what has not begun would be cancelled
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
        assert not store._begun
        assert store.stats.bytes_missing + store.stats.bytes_unused > 0
        store.close()
