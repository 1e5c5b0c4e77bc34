"""A file that is not as it was when its header was read gives no token: neither its experts nor the other weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from store_cases import every_case, every_streaming_case, opened
from streaming import Disk, Source

from flash_moe import CheckpointError, ExpertReadError, Model, Progress
from flash_moe.experts.mapped_file import PAGE
from flash_moe.experts.opening import ExpertIO, open_store
from flash_moe.models import open_model

pytestmark = pytest.mark.usefixtures("small_groups")


def rewrite(file: Path) -> None:
    """In place, and the old time of modification is put back."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        stream.write(bytes(before.st_size - before.st_size // 2))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(file: Path) -> None:
    """By another file of the same size and times."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[: before.st_size // 2] + bytes(before.st_size - before.st_size // 2))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def truncate(file: Path) -> None:
    os.truncate(file, PAGE)


every_change = pytest.mark.parametrize("change", [rewrite, exchange, truncate])


@pytest.fixture
def copy(sources: dict[str, Source], form: str, tmp_path: Path) -> Source:
    return Source(Path(shutil.copytree(sources[form].folder, tmp_path / form)), sources[form].records)


def files(source: Source) -> set[Path]:
    return {extent.file for layer in range(4) for extent in source.table.extents(layer, 0)}


@every_change
@every_streaming_case
def test_a_change_between_opening_the_store_and_its_first_fetch(
    copy: Source, io: ExpertIO, cache: int, change: Callable[[Path], None]
) -> None:
    store, changed = opened(copy, io, cache), files(copy)
    for file in changed:
        change(file)
    for call in (lambda: store.in_memory(2, [3]), lambda: store.fetch(2, [3])):
        with pytest.raises(ExpertReadError, match="load the model again") as caught:
            call()
        assert (caught.value.layer, caught.value.expert) == (2, 3)
    store.close()


@every_change
@every_case
def test_a_change_between_reading_the_header_and_opening_the_store(
    copy: Source, io: ExpertIO, cache: int, change: Callable[[Path], None]
) -> None:
    table = copy.table
    for file in files(copy):
        change(file)
    with pytest.raises(CheckpointError, match="load the model again"):
        store = open_store(table, io, 4, cache)
        store.fetch(2, [3])


@pytest.mark.parametrize("form", ["packed", "stacked"])
def test_a_change_during_a_read(copy: Source, disk: Disk) -> None:
    """What a read found is used only if the file was still the same at its end."""
    store = opened(copy, "slots")
    (extent, *_) = copy.table.extents(1, 5)

    def fault(path: str, offset: int) -> None:
        if path == str(extent.file) and offset == extent.offset:
            disk.fault = None
            rewrite(extent.file)

    disk.fault = fault
    with pytest.raises(ExpertReadError, match="load the model again"):
        store.fetch(1, [5])
    store.close()


@every_change
def test_resident_weights_of_a_changed_file(
    quantized_checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    checkpoint = open_model(Path(shutil.copytree(quantized_checkpoint, tmp_path / "copy")))
    for file in {info.file for info in checkpoint.resident.values()}:
        change(file)
    with pytest.raises(CheckpointError, match="load the model again"):
        checkpoint.load_resident(mx.float32)


def test_resident_weights_that_change_while_they_are_loaded(packed_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_checkpoint, tmp_path / "copy"))

    def progress(now: Progress) -> None:
        if (now.stage, now.done) == ("layers", 1):
            for file in folder.glob("model*.safetensors"):
                rewrite(file)

    with pytest.raises(CheckpointError, match="load the model again"):
        Model.load(folder, progress=progress)
