"""Ctrl-C at any moment of a fetch: no later one finds wrong bytes, waits for ever, or has fewer threads."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest
from store_cases import every_packed_stream, opened
from streaming import Source, record_bytes

from flash_moe.experts.mapped_file import MappedFile, pages_of
from flash_moe.experts.opening import ExpertIO

SECONDS = 1.0
LATEST = 0.002  # seconds from the beginning of a fetch to its interruption


@pytest.fixture
def alarm() -> Iterator[None]:
    """The timer's signal does what Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # interrupted in a weak reference's callback
@pytest.mark.usefixtures("alarm", "small_groups")
@pytest.mark.parametrize("reading", ["threads"], indirect=True)
@every_packed_stream
def test_fetches_that_are_interrupted(
    sources: dict[str, Source], io: ExpertIO, cache: int, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, source = random.Random(0), sources["packed"]

    def residency(self: MappedFile, offset: int, nbytes: int) -> bytearray:
        return bytearray([rng.random() < 0.5]) * len(pages_of(offset, nbytes))

    monkeypatch.setattr(MappedFile, "residency", residency)
    store = opened(source, io, cache)
    queue = store._reader._queue
    free = queue._disk.free, queue._page_cache.free
    layers, experts = sorted({layer for layer, _ in source.records}), range(16)
    interrupted, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        layer, following = rng.choice(layers), rng.choice(layers)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, LATEST))
                meanwhile = partial(store.prefetch, following, rng.sample(experts, 2))
                store.fetch(layer, rng.sample(experts, 2), meanwhile)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (KeyboardInterrupt, RuntimeError):  # Python's own locks raise the second when interrupted while waiting
            interrupted += 1
        else:
            wanted = rng.sample(experts, 2)
            assert record_bytes(store.fetch(layer, wanted)) == [source.records[layer, expert] for expert in wanted]
    assert interrupted > 20
    for layer, expert in source.records:
        assert record_bytes(store.fetch(layer, [expert])) == [source.records[layer, expert]]
    queue.close()
    assert (queue._disk.free, queue._page_cache.free) == free
    store.close()
