from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_cases import STRIDE
from streaming import Disk, Source

from flash_moe import ExpertReadError, ModelClosedError
from flash_moe.experts.mapped_file import PAGE, MappedFile, pages_of
from flash_moe.experts.reader import RecordReader

FORMS = ("fused", "separate", "stacked", "packed")


def read(source: Source, keys: list[tuple[int, int]]) -> None:
    """Reads records one layer at a time and compares them with what they must be."""
    reader = RecordReader(source.table)
    try:
        for layer in {layer for layer, _ in keys}:
            experts = [expert for other, expert in keys if other == layer]
            buffers = [np.zeros(reader.table.layouts[layer].stride, np.uint8) for _ in experts]
            reader.read_all(layer, experts, buffers)
            assert [b.tobytes() for b in buffers] == [source.records[layer, expert] for expert in experts]
    finally:
        reader.close()


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("form", FORMS)
def test_records_are_read_whole(sources: dict[str, Source], form: str, reading: str, disk: Disk) -> None:
    read(sources[form], list(sources[form].records))
    if reading == "threads":
        assert max(count for _, count in disk.calls) <= PAGE  # every read was split


@pytest.mark.parametrize("reading", ["threads"], indirect=True)
@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (99, STRIDE // PAGE)])
def test_what_the_page_cache_has_is_copied_in_as_many_parts_as_there_are_cores(
    sources: dict[str, Source], reading: str, disk: Disk, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(MappedFile, "missing_bytes", lambda self, offset, nbytes: 0)
    read(sources["packed"], [(1, 3)])
    sizes = sorted(count for _, count in disk.calls)
    assert len(sizes) == expected
    assert sizes[-1] - sizes[0] < 64 * expected


@pytest.mark.parametrize("form", FORMS)
def test_short_reads_are_continued(sources: dict[str, Source], form: str, reading: str, disk: Disk) -> None:
    rng = random.Random(form)
    disk.fault = lambda path, offset: rng.choice([1, 7, 500, 5000])
    read(sources[form], [(0, 3), (0, 15), (3, 0)])
    whole = sum(len(sources[form].records[key]) for key in [(0, 3), (0, 15), (3, 0)])
    assert len(disk.calls) > whole // 5000


def fail_to_read(source: Source, layer: int, expert: int) -> ExpertReadError:
    reader = RecordReader(source.table)
    buffers = [np.zeros(reader.table.layouts[layer].stride, np.uint8) for _ in range(3)]
    try:
        with pytest.raises(ExpertReadError) as caught:
            reader.read_all(layer, [1, expert, 2], buffers)
    finally:
        reader.close()
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_failing_read_names_file_layer_and_expert(
    sources: dict[str, Source], form: str, reading: str, disk: Disk
) -> None:
    extent = sources[form].table.extents(2, 9)[-1]
    disk.fail(extent.file, extent.offset, extent.nbytes)
    error = fail_to_read(sources[form], 2, 9)
    assert (error.file, error.layer, error.expert) == (str(extent.file), 2, 9)
    for words in ("expert 9 of layer 2", str(extent.file), "Input/output error"):
        assert words in str(error)


def test_end_of_file_is_an_error(sources: dict[str, Source], reading: str, disk: Disk) -> None:
    extent = sources["packed"].table.extents(1, 5)[0]
    end = extent.offset + PAGE
    disk.fault = lambda path, offset: 0 if offset >= end and offset < extent.offset + extent.nbytes else 512
    error = fail_to_read(sources["packed"], 1, 5)
    assert (error.layer, error.expert) == (1, 5)
    found = re.search(r"it ends at byte (\d+)", str(error))
    assert found is not None
    assert end <= int(found[1]) < extent.offset + extent.nbytes, "of several threads, any may be the first"


def test_all_reads_have_ended_when_the_error_is_raised(
    sources: dict[str, Source], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a late read could still write into memory that has been given away."""
    monkeypatch.setattr("flash_moe.experts.reader.INLINE", 0)
    running = []

    def fault(path: str, offset: int) -> None:
        running.append(offset)
        try:
            if len(running) == 1:
                raise OSError(5, "Input/output error")
        finally:
            ended.append(offset)

    ended: list[int] = []
    disk.fault = fault
    reader = RecordReader(sources["fused"].table)
    buffers = [np.zeros(reader.table.layouts[0].stride, np.uint8) for _ in range(16)]
    with pytest.raises(ExpertReadError):
        reader.read_all(0, range(16), buffers)
    assert len(ended) == 3 * 16
    reader.close()


def test_missing_file(sources: dict[str, Source], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(sources["packed"].folder, tmp_path / "packed"))
    copy = Source(folder, sources["packed"].records)
    reader = RecordReader(copy.table)
    (folder / "experts-00002.safetensors").unlink()
    with pytest.raises(ExpertReadError, match="No such file") as caught:
        reader.locate(2, 0)
    assert (caught.value.layer, caught.value.expert) == (2, 0)
    reader.close()


def test_nothing_is_read_after_close(sources: dict[str, Source]) -> None:
    reader = RecordReader(sources["packed"].table)
    assert reader.locate(0, 0)
    reader.close()
    with pytest.raises(ModelClosedError, match=r"closed.*load it again"):
        reader.locate(0, 0)


def test_missing_pages_of_a_file_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * PAGE + 1))
    file = MappedFile(path)
    assert file.missing_pages(0, 10 * PAGE + 1).tolist() == [False] * 11
    assert len(file.missing_pages(PAGE - 1, 2)) == 2
    file.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: None, None),
        (lambda path: path.write_bytes(bytes(4999)), "now 4999 bytes long, it was 5000"),
        (lambda path: path.write_bytes(bytes(5001)), "now 5001 bytes long, it was 5000"),
        (lambda path: path.write_bytes(b"x" * 5000), "was changed since its header was read; load the model again"),
    ],
    ids=["none", "shorter", "longer", "rewritten"],
)
def test_changes_of_a_file_are_noticed(tmp_path: Path, change: Callable[[Path], object], words: str | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    os.utime(path, ns=(0, 0))  # the clock of file systems is coarse
    file = MappedFile(path)
    change(path)
    assert file.change() is None if words is None else words in str(file.change())
    file.close()


@pytest.mark.parametrize(("missing", "share"), [((), 0), ((0,), 0.25), ((1, 2, 3), 0.75), ((0, 1, 2, 3), 1)])
def test_a_sample_of_a_record_tells_which_share_is_absent(
    sources: dict[str, Source], missing: tuple[int, ...], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_fourth(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        return bytearray(page % 4 not in missing for page in pages_of(offset, nbytes))

    monkeypatch.setattr(MappedFile, "residency", every_fourth)
    monkeypatch.setattr("flash_moe.experts.reader.SAMPLE", PAGE)
    users = random.getstate()
    for form in FORMS if share in (0, 1) else ("packed",):  # parts that begin inside a page share it with others
        reader = RecordReader(sources[form].table)
        location = reader.locate(1, 5)
        found = [location.missing_share() for _ in range(2000)]
        assert set(found) <= {0, 1}, "more than a page was asked for"
        assert abs(np.mean(found) - share) < (0.05 if 0 < share < 1 else 1e-9)
        reader.close()
    assert random.getstate() == users
