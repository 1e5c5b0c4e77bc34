"""The stores that tests run over: every way of reading, over every form of checkpoint."""

from __future__ import annotations

import pytest
from streaming import Source

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
PACKED_STREAMS: dict[str, tuple[ExpertIO, int]] = {
    "mapped": ("mapped", 0), "slots": ("slots", 0), "cached slots": ("slots", 6 * STRIDE)
}  # fmt: skip

every_case = pytest.mark.parametrize(("form", "io", "cache"), CASES.values(), ids=CASES)
every_streaming_case = pytest.mark.parametrize(("form", "io", "cache"), STREAMING.values(), ids=STREAMING)
every_packed_stream = pytest.mark.parametrize(("io", "cache"), PACKED_STREAMS.values(), ids=PACKED_STREAMS)


def opened(source: Source, io: ExpertIO, cache: int = 0) -> ExpertStore:
    return open_store(source.table, io, K, cache)
