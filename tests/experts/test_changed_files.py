"""Files that change or vanish under an open store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_cases import every_case, every_streaming_case, opened
from streaming import Source, record_bytes

from flash_moe import ExpertReadError
from flash_moe.experts.opening import ExpertIO

pytestmark = pytest.mark.usefixtures("small_groups")


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


@pytest.mark.parametrize("form", ["packed", "stacked"])
def test_resident_store_needs_no_files(sources: dict[str, Source], tmp_path: Path, form: str) -> None:
    source = Source(Path(shutil.copytree(sources[form].folder, tmp_path / form)), sources[form].records)
    store = opened(source, "resident")
    shutil.rmtree(source.folder)
    for (layer, expert), record in source.records.items():
        assert record_bytes(store.fetch(layer, [expert])) == [record]
