"""Stores over the shared checkpoints, small enough that records keep evicting each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from expected_records import expected_records
from streaming import Disk, Source

from flash_moe.experts import opening
from flash_moe.experts.mapped_file import PAGE, MappedFile, pages_of


@pytest.fixture(scope="session")
def sources(
    float_checkpoint: Path, next_checkpoint: Path, quantized_checkpoint: Path, packed_checkpoint: Path
) -> dict[str, Source]:
    """The four forms, each of 4 layers and 16 experts: 3, 3, 9 and 1 extents a record."""
    quantized = expected_records(quantized_checkpoint)
    return {
        "fused": Source(float_checkpoint, expected_records(float_checkpoint)),
        "separate": Source(next_checkpoint, expected_records(next_checkpoint)),
        "stacked": Source(quantized_checkpoint, quantized),
        "packed": Source(packed_checkpoint, quantized),
    }


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch may ask for no more records than one token needs, so that slots are few."""
    monkeypatch.setattr(opening, "_GROUP_BYTES", 0)


@pytest.fixture(params=["inline", "threads"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reads done in the calling thread, or split into requests of one page on the reading threads."""
    if request.param == "threads":
        monkeypatch.setattr("flash_moe.experts.reader.INLINE", -1)
        for request_bytes in ("reader.REQUEST", "reader.COPY", "mapped.REQUEST"):
            monkeypatch.setattr(f"flash_moe.experts.{request_bytes}", PAGE)
    return request.param


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Puts a :class:`Disk` between the stores and the files."""
    state, paths = Disk(), {}
    real_preadv, real_open = os.preadv, os.open

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        limit = state.fault(paths[fd], offset) if state.fault is not None else None
        (buffer,) = buffers
        count = 0 if limit == 0 else real_preadv(fd, [buffer[:limit]], offset)
        state.calls.append((offset, count))
        return count

    def remembering_open(path: str, *arguments: int, **keywords: int) -> int:
        fd = real_open(path, *arguments, **keywords)
        paths[fd] = str(path)
        return fd

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", remembering_open)
    return state


@pytest.fixture
def cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page counts as missing, so that the mapped store reads whatever it hands out."""

    def residency(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        return bytearray(len(pages_of(offset, nbytes)))

    monkeypatch.setattr(MappedFile, "residency", residency)
