"""What the statistics call missing is what the operating system reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe.bench.system import disk_bytes_read
from flash_moe.experts.opening import open_store
from flash_moe.experts.reader import RecordReader
from flash_moe.models import open_model
from flash_moe.packing.convert import convert

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/io")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counters")
    text = text_config(
        hidden_size=512, num_hidden_layers=2, num_experts=16, moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )  # fmt: skip
    convert(write_checkpoint(folder / "float", text), folder / "packed", bits=8)
    return folder / "packed"


def make_cold(folder: Path) -> None:
    """Empties the page cache of the experts' files; skips where the file system keeps them (one in memory, say)."""
    table = open_model(folder).records()
    reader = RecordReader(table)
    try:
        reader.evict(flush=True)
        if reader.locate(0, 5).missing_bytes() < table.max_stride:
            pytest.skip("this file system cannot be made cold")
    finally:
        reader.close()


@pytest.mark.parametrize("expert_io", ["slots", "mapped"])
def test_bytes_missing_are_bytes_read(expert_io: str, packed: Path) -> None:
    make_cold(packed)
    before = disk_bytes_read()
    store = open_store(open_model(packed).records(), expert_io, 4)
    try:
        for layer in (0, 1):
            for experts in ([1, 4, 9], [12, 4], [15, 2, 7]):
                records = store.fetch(layer, experts)
                assert all(np.array(array).any() for array in records.arrays)
        read = disk_bytes_read() - before
        if not read:
            pytest.skip("the system counts no bytes for this file system")
        stride = store.layouts[0].stride
        assert store.stats.bytes_missing == 2 * 7 * stride
        assert abs(read / store.stats.bytes_missing - 1) < 0.05
    finally:
        store.close()
