"""Reads measured by `flash_moe.bench.io`: of a checkpoint in any form, and of any file."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe.bench import fetches
from flash_moe.bench.fetches import fetch_speed
from flash_moe.bench.io import SIZES, bench_io
from flash_moe.bench.raw_reads import THREADS, open_files, raw_speed
from flash_moe.bench.system import available_memory, disk_bytes_read
from flash_moe.errors import ArgumentError, CheckpointError, ConfigError
from flash_moe.experts.mapped_file import MappedFile
from flash_moe.experts.store import Records
from flash_moe.limits import memory_limit
from flash_moe.models import open_model


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("io") / "large"
    path.write_bytes(os.urandom(8 << 20))
    return path


@pytest.mark.parametrize("form", ["packed", "quantized", "float"])
def test_a_checkpoint(form: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{form}_checkpoint")
    found = bench_io(folder, None, 0.3)
    table = open_model(folder).records()
    assert found.record_bytes == table.max_stride
    assert {speed.threads for speed in found.raw} == set(THREADS)
    assert [(f.store, f.records) for f in found.fetches] == [
        (store, records) for store in ("mapped", "slots") for records in (4, 16)
    ]
    assert all(speed.cold > 0 and speed.warm > 0 for speed in found.raw)
    assert all(fetch.warm > 0 for fetch in found.fetches)
    assert json.loads(json.dumps(found.to_dict()))["really_cold"] == found.really_cold


def test_a_file(large_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = bench_io(large_file, 4, 0.3, lambda done, total: seen.append((done, total)))
    cells = len(SIZES) * len(THREADS)
    assert [(s.request_bytes, s.threads) for s in found.raw] == [(size, n) for size in SIZES for n in THREADS]
    assert (found.record_bytes, found.fetches, found.nbytes) == (None, (), 8 << 20)
    assert seen == [(number, cells) for number in range(1, cells + 1)]


def test_cold_reads_begin_with_an_empty_page_cache(large_file: Path) -> None:
    files = open_files([large_file])
    try:
        files[0].evict()
        if files[0].cached_bytes():
            pytest.skip("this file system keeps its pages")
        for _ in range(2):  # the second time the file is in memory before
            before = disk_bytes_read()
            found = raw_speed(files, 2, 1 << 20, 10)
            after = disk_bytes_read()
            assert found.missing == 1
            assert files[0].cached_bytes() == 8 << 20
            if before is not None and after is not None:
                assert after - before >= 8 << 20
    finally:
        files[0].close()


def test_eviction_drops_a_range_even_while_it_is_mapped(large_file: Path) -> None:
    file = MappedFile(large_file)
    file.evict(flush=True)
    if file.cached_bytes():
        pytest.skip("this file system keeps its pages")
    content = bytes(file.pages)
    assert file.cached_bytes() == 8 << 20
    file.evict(1 << 20, 2 << 20)
    missing = file.missing_pages(0, 8 << 20)
    pages = (1 << 20) // (missing.size and (8 << 20) // missing.size)
    assert missing[pages : 3 * pages].all()
    assert not missing[:pages].any()
    assert bytes(file.pages) == content
    file.close()


def test_time_is_kept(large_file: Path) -> None:
    start = time.perf_counter()
    bench_io(large_file, 4, 0.5)
    assert time.perf_counter() - start < 5  # of a busy machine


@pytest.mark.parametrize("kind", ["mapped", "slots"])
def test_fetches_are_served_from_outside_the_store(packed_checkpoint: Path, kind: str) -> None:
    table = open_model(packed_checkpoint).records()
    for records in (1, 4, 16):
        found = fetch_speed(table, kind, records, 0.05)
        assert (found.store, found.records) == (kind, records)
        assert found.warm > 0
        assert found.cold is None or found.cold > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_warm_fetches_are_not_served_from_a_bank_that_holds_everything(packed_checkpoint: Path, layers: int) -> None:
    table = open_model(packed_checkpoint).records()
    few = replace(table, layouts={i: table.layouts[i] for i in range(layers)})
    for records in (1, 4, 16):
        assert fetch_speed(few, "slots", records, 0.05).warm > 0


@pytest.mark.parametrize(
    ("kind", "cuda", "copies"), [("mapped", True, True), ("mapped", False, False), ("slots", True, False)]
)
def test_the_copy_to_a_cuda_device_belongs_to_a_fetch_of_mapped_records(
    packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cuda: bool, copies: bool
) -> None:
    stacked: list[int] = []

    def stack(records: Records) -> mx.array:
        stacked.append(len(records.arrays))
        return mx.zeros(1)

    monkeypatch.setattr(fetches, "on_cuda", lambda: cuda)
    monkeypatch.setattr(Records, "stacked", stack)
    found = fetch_speed(open_model(packed_checkpoint).records(), kind, 4, 0.05)
    assert found.warm > 0
    assert set(stacked) == ({4} if copies else set())


def test_errors(tmp_path: Path, packed_checkpoint: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="the longest file has 4 bytes, expected 262144 or more"):
        bench_io(tmp_path / "short", 4, 0.1)
    with pytest.raises(ConfigError):
        bench_io(tmp_path, 4, 0.1)
    with pytest.raises(ArgumentError, match="experts_per_token is 17, expected an integer from 1 to 4"):
        bench_io(packed_checkpoint, 17, 0.1)


def test_memory_of_the_machine() -> None:
    assert 0 < available_memory() <= memory_limit()
