"""A store that is closed, or could not be opened, leaves no file open and no thread running."""

from __future__ import annotations

import gc
import os
import threading

import pytest
from store_cases import every_case, every_streaming_case, opened
from streaming import Disk, Source

from flash_moe import ExpertReadError, ModelClosedError
from flash_moe.experts.opening import ExpertIO

pytestmark = pytest.mark.usefixtures("small_groups")


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
    with pytest.raises(ModelClosedError, match="load it again"):
        store.fetch(0, [1])


def test_failed_opening_leaves_nothing_open(sources: dict[str, Source], disk: Disk) -> None:
    (extent,) = sources["packed"].table.extents(1, 7)
    disk.fail(extent.file, extent.offset, extent.nbytes)
    before, threads = descriptors(), set(threading.enumerate())
    with pytest.raises(ExpertReadError, match="expert 7 of layer 1"):
        opened(sources["packed"], "resident")
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads
