"""Open files: one descriptor each, gone with the model, an error that names the limit; file systems that cannot map."""

from __future__ import annotations

import errno
import gc
import os
import resource
from pathlib import Path

import pytest
from store_cases import every_case, opened
from streaming import Source, record_bytes

from flash_moe import CheckpointError, ExpertReadError, Model
from flash_moe.experts import mapped_file
from flash_moe.experts.opening import ExpertIO, open_store
from flash_moe.experts.slots import SlotStore


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))  # noqa: PTH208


@pytest.mark.parametrize("io", ["mapped", "slots"])
def test_a_model_that_is_dropped_closes_its_files(packed_checkpoint: Path, io: str) -> None:
    """As in a notebook whose cell is run again."""
    before = descriptors()
    for _ in range(3):
        model = Model.load(packed_checkpoint, expert_io=io)
        model.generate([1, 2, 3], max_tokens=2)
        assert descriptors() == before + 4, "one for each file with experts"
        del model
    assert descriptors() == before


@pytest.mark.parametrize("io", ["mapped", "slots"])
def test_too_many_open_files(sources: dict[str, Source], io: ExpertIO) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    table = sources["packed"].table
    with pytest.raises(CheckpointError, match="ulimit -n"):
        taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        _, second = [number for number in range(len(taken) + 3) if number not in taken][:2]
        resource.setrlimit(resource.RLIMIT_NOFILE, (second, hard))  # one more can be opened
        try:
            store = open_store(table, io, 4)
            for layer in range(4):
                store.fetch(layer, [0])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def cannot_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def mapping(fd: int, size: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mapped_file, "_Mapping", mapping)


@pytest.mark.usefixtures("cannot_map", "small_groups")
@every_case
def test_a_file_system_that_cannot_map(
    sources: dict[str, Source], form: str, io: ExpertIO, cache: int, reading: str
) -> None:
    source = sources[form]
    if io == "mapped":
        with pytest.raises(CheckpointError, match=r"cannot be mapped.*No such device.*use 'slots'"):
            opened(source, io, cache)
        return
    store = opened(source, io, cache)
    for layer in range(4):
        ids = [3, 0, 9, 12]
        if not store.holds_everything:
            assert store.in_memory(layer, ids) == [False] * 4
        assert record_bytes(store.fetch(layer, ids)) == [source.records[layer, expert] for expert in ids]
    assert store.stats.bytes_missing > 0
    assert store.cached_bytes() == 0
    store.close()


@pytest.mark.usefixtures("cannot_map")
def test_auto_takes_slots_where_nothing_can_be_mapped(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FLASH_MOE_EXPERT_IO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flash_moe.experts.choosing.mx.metal.is_available", lambda: True)
    store = open_store(sources["packed"].table, "auto", 4)
    assert isinstance(store, SlotStore)
    store.close()


@pytest.mark.usefixtures("small_groups")
def test_a_system_that_does_not_say_what_is_cached(sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __getattr__(self, name: str) -> object:
            return (lambda *arguments: -1) if name == "mincore" else getattr(real, name)

    real = mapped_file._libc
    monkeypatch.setattr(mapped_file, "_libc", Libc())
    source = sources["packed"]
    for io in ("mapped", "slots", "resident"):
        store = opened(source, io)
        assert record_bytes(store.fetch(1, [4, 2])) == [source.records[1, 4], source.records[1, 2]]
        store.close()


def test_a_read_error_leaves_no_descriptor(sources: dict[str, Source], tmp_path: Path) -> None:
    import shutil

    source = Source(Path(shutil.copytree(sources["packed"].folder, tmp_path / "copy")), sources["packed"].records)
    store, before = opened(source, "slots"), descriptors()
    for extent in source.table.extents(1, 0):
        os.truncate(extent.file, 0)
    for _ in range(5):
        with pytest.raises(ExpertReadError):
            store.fetch(1, [0])
    assert descriptors() == before
    store.close()
