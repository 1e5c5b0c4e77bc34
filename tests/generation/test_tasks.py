"""Generations that run at the same time: each counts what is its own, and each can be cancelled alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from flash_moe import Model
from flash_moe.errors import Cancelled, FlashMoEError
from flash_moe.experts.mapped_file import MappedFile, pages_of
from flash_moe.nn.network import Task
from flash_moe.nn.prefetch_switch import PrefetchSwitch
from flash_moe.progress import Progress

PROMPT = [10, 20, 30, 40, 50]


@pytest.mark.parametrize("io", ["mapped", "slots", "resident"])
def test_streams_in_turn_count_their_own(packed_checkpoint: Path, io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefetchSwitch, "on", True)
    monkeypatch.setattr(MappedFile, "residency", lambda self, *where: bytearray(len(pages_of(*where))))
    options = {"expert_io": io, "prefetch": True, "drop_cold_below": 0.2}
    with Model.load(packed_checkpoint, experts_per_token=None, **options) as model:
        model.tokenizer.eos_token_ids = frozenset()
        streams = [model.stream([*PROMPT, 60 + i], max_tokens=5 + 5 * i, temperature=0) for i in range(3)]
        last: list = [None] * 3
        while any(found := [next(stream, None) for stream in streams]):
            last = [new or old for new, old in zip(found, last, strict=True)]
        total = model.expert_store.stats
        layers, stride = model.config.num_hidden_layers, model.expert_store.layouts[0].stride
        for i, chunk in enumerate(last):
            stats = chunk.stats
            tokens = 5 + 5 * i
            assert stats.generated_tokens == tokens
            assert stats.expert_bytes_per_token <= layers * model.experts_per_token * stride
            assert stats.expert_bytes_missing <= stats.expert_bytes_requested
            assert stats.prefetch.tokens in (tokens - 1, 0 if io == "resident" else tokens - 1)
            if io != "resident":
                routed = (tokens - 1) * layers * model.experts_per_token
                assert stats.choice.routed == routed
        assert sum(chunk.stats.expert_bytes_requested for chunk in last) == total.bytes_requested
        assert sum(chunk.stats.fetch_seconds for chunk in last) == pytest.approx(total.fetch_seconds)
        if io != "resident":
            assert sum(chunk.stats.expert_bytes_missing for chunk in last) == total.bytes_missing
            assert sum(chunk.stats.prefetch.bytes_unused for chunk in last) == total.bytes_unused


def test_threads_count_their_own(model: Model) -> None:
    alone = model.generate(PROMPT, max_tokens=12, temperature=0).stats.expert_bytes_per_token
    found: list[float] = []

    def work() -> None:
        found.append(model.generate(PROMPT, max_tokens=12, temperature=0).stats.expert_bytes_per_token)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 3 * [alone]


@pytest.mark.parametrize("io", ["mapped", "slots"])
def test_a_cancelled_task_stops_while_it_waits_for_a_read(
    packed_checkpoint: Path, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another task asks for then is read as if nothing had happened."""
    import os

    seconds, preadv, event = [0.0], os.preadv, threading.Event()
    monkeypatch.setattr("flash_moe.experts.reader.INLINE", -1)
    monkeypatch.setattr(MappedFile, "residency", lambda self, *where: bytearray(len(pages_of(*where))))
    monkeypatch.setattr(os, "preadv", lambda *arguments: time.sleep(seconds[0]) or preadv(*arguments))
    with Model.load(packed_checkpoint, experts_per_token=None, expert_io=io) as model:
        model.tokenizer.eos_token_ids = frozenset()
        expected = model.generate(PROMPT, max_tokens=8, temperature=0).tokens
        model.forget()
        seconds[0] = 2.0
        timer = threading.Timer(0.2, event.set)
        timer.start()
        start = time.perf_counter()
        with pytest.raises(Cancelled):
            model._engine.prefill(PROMPT, model._engine.new_cache(), task=Task(cancelled=event.is_set))
        assert time.perf_counter() - start < 1.5
        timer.join()
        seconds[0] = 0.0
        assert model.generate(PROMPT, max_tokens=8, temperature=0).tokens == expected


def test_a_stream_that_is_collected_while_the_prefixes_are_locked(model: Model) -> None:
    """The garbage collector may run anywhere: also where this thread holds the lock that giving a cache back takes."""
    stream = model.stream(PROMPT, max_tokens=5)
    next(stream)

    def work() -> None:
        with model._prefixes._lock:
            stream.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for itself"


def test_a_sequence_whose_pass_failed_is_not_continued(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers hold the prompt then and others do not: every way out of a generation gives its cache back."""
    expected = model.generate([7, 8, 9, 10], max_tokens=4, temperature=0).tokens
    model.forget()
    fetch = model._store._arrive

    def broken(layer: int, experts: list[int]) -> object:
        if layer == 2:
            raise FlashMoEError("the disk is gone")
        return fetch(layer, experts)

    with monkeypatch.context() as context:
        context.setattr(model._store, "_arrive", broken)
        with pytest.raises(FlashMoEError, match="gone"):
            model.generate([7, 8, 9], max_tokens=2)
    assert model.generate([7, 8, 9, 10], max_tokens=4, temperature=0).tokens == expected


def test_a_progress_callback_that_raises_loses_no_sequence(model: Model) -> None:
    def stop(progress: Progress) -> None:
        raise RuntimeError("enough")

    model.generate(PROMPT, max_tokens=2)
    with pytest.raises(RuntimeError, match="enough"):
        model.generate([*PROMPT, 60, 61], max_tokens=2, progress=stop)
    assert model.generate([*PROMPT, 60], max_tokens=2).stats.reused_tokens > 0
