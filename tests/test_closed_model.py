"""A model that is closed while it is used: right tokens or one clear error, nothing waits for ever, all memory is freed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe import ForkError, Model, ModelClosedError
from flash_moe.experts.mapped_file import MappedFile, pages_of
from flash_moe.experts.reader import RecordReader
from flash_moe.experts.store import ExpertStore

STORES = ["mapped", "slots", "resident"]
PROMPT = [10, 20, 30, 40, 50]
every_store = pytest.mark.parametrize("io", STORES)


def load(folder: Path, io: str) -> Model:
    model = Model.load(folder, experts_per_token=None, expert_io=io)
    model.tokenizer.eos_token_ids = frozenset()
    return model


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every read goes through threads, and takes the seconds of the list's only item."""
    seconds, preadv = [0.001], os.preadv
    monkeypatch.setattr("flash_moe.experts.reader.INLINE", -1)
    monkeypatch.setattr(MappedFile, "residency", lambda self, *where: bytearray(len(pages_of(*where))))

    def slowly(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(seconds[0])
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slowly)
    return seconds


def run(model: Model, tokens: list[int], ends: list[object]) -> None:
    """Collects the tokens of a stream, then the class of what ended it, then the time."""
    try:
        for chunk in model.stream(PROMPT, max_tokens=40, temperature=0):
            tokens.append(chunk.token)
    except Exception as error:
        ends.append(type(error))
    ends.append(time.perf_counter())


@pytest.mark.parametrize("io", ["mapped", "slots"])
def test_closing_while_another_thread_generates(packed_checkpoint: Path, io: str, slow_reads: list[float]) -> None:
    """At random moments: all tokens that came out are right, and then comes the error, within a second."""
    slow_reads[0] = 0.0005
    with load(packed_checkpoint, io) as model:
        expected = model.generate(PROMPT, max_tokens=40, temperature=0).tokens
    rng = random.Random(0)
    for _ in range(8):
        model, tokens, ends = load(packed_checkpoint, io), list[int](), list[object]()

        thread = threading.Thread(target=run, args=(model, tokens, ends), daemon=True)
        thread.start()
        time.sleep(rng.uniform(0, 0.15))
        closed = time.perf_counter()
        model.close()
        thread.join(10)
        assert not thread.is_alive()
        *error, end = ends
        assert error in ([ModelClosedError], [])
        assert end - closed < 1.5
        assert tuple(tokens) == expected[: len(tokens)]


@pytest.mark.parametrize("io", ["mapped", "slots"])
def test_a_read_that_hangs_holds_nobody_up(packed_checkpoint: Path, io: str, slow_reads: list[float]) -> None:
    """And its file stays open, for as long as it reads and no longer."""
    gc.collect()
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    model, failed = load(packed_checkpoint, io), list[type]()
    slow_reads[0] = 3.0

    def work() -> None:
        try:
            model.generate(PROMPT, max_tokens=2)
        except ModelClosedError as error:
            failed.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    start = time.perf_counter()
    model.close()
    thread.join()
    assert time.perf_counter() - start < 1.5
    assert failed == [ModelClosedError]
    assert len(os.listdir("/dev/fd")) > before, "the read that hangs still needs its file"  # noqa: PTH208
    deadline = time.monotonic() + 20
    while len(os.listdir("/dev/fd")) > before and time.monotonic() < deadline:  # noqa: PTH208
        time.sleep(0.05)
        gc.collect()
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed goes because nothing refers to it: to search for circles takes longer than all else of closing."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@every_store
@pytest.mark.parametrize("kernels", [False, True], ids=["MLX's ops", "kernels"])
@pytest.mark.parametrize("running", [False, True], ids=["idle", "while a stream waits for its caller"])
def test_closing_frees_weights_and_banks(
    packed_checkpoint: Path, io: str, running: bool, kernels: bool, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_MOE_KERNELS", "on" if kernels else "off")
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load(packed_checkpoint, io)
    stream = model.stream(PROMPT, max_tokens=5)
    next(stream)
    sequence = stream.gi_frame.f_locals["cache"].nbytes if running else 0
    if not running:
        stream.close()
        del stream
    model.close()
    assert mx.get_active_memory() - before < 1.2 * sequence + 10_000
    if running:
        with pytest.raises(ModelClosedError):
            list(stream)


CALLS: dict[str, Callable[[Model], object]] = {
    "generate": lambda model: model.generate(PROMPT),
    "stream": lambda model: next(model.stream(PROMPT)),
    "logits": lambda model: model.logits(PROMPT),
    "last logits": lambda model: model.logits(PROMPT, last=1),
    "encode": lambda model: model.encode("text"),
    "forget": lambda model: model.forget(),
    "streaming": lambda model: model.streaming,
    "expert_store": lambda model: model.expert_store,
}


@every_store
def test_every_call_of_a_closed_model_says_so(packed_checkpoint: Path, io: str) -> None:
    model = load(packed_checkpoint, io)
    store, running = model.expert_store, model.stream(PROMPT, max_tokens=5)
    next(running)
    model.close()
    model.close()  # again is harmless
    calls = [*CALLS.values(), lambda model: next(running), lambda model: store.fetch(0, [1])]
    for call in calls:
        with pytest.raises(ModelClosedError, match="closed"):
            call(model)
    assert "closed" in repr(model)


def test_a_fork_says_that_it_cannot_generate(packed_checkpoint: Path) -> None:
    """MLX's threads and ours do not exist in it: it would wait for ever."""
    model = load(packed_checkpoint, "slots")
    model.generate(PROMPT, max_tokens=1)
    stream = model.stream(PROMPT, max_tokens=3)
    next(stream)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()

    def child() -> None:
        found = []
        for call in (*CALLS.values(), lambda model: next(stream), lambda model: Model.load(packed_checkpoint)):
            try:
                call(model)
            except Exception as error:
                found.append((type(error), str(error)))
        model.close()
        sender.send(found)
        os._exit(0)

    with model._engine._turn:  # as if another thread were generating
        process = context.Process(target=child)
        process.start()
        answered = receiver.poll(30)
        if not answered:
            process.kill()
    assert answered, "the child hangs"
    found = receiver.recv()
    process.join(10)
    assert [kind for kind, _ in found] == (len(CALLS) + 2) * [ForkError]
    assert all("spawn" in text for _, text in found)
    assert len(model.generate(PROMPT, max_tokens=2).tokens) == 2, "the parent goes on"
    model.close()


def fetch(store: ExpertStore, failed: list[type]) -> None:
    try:
        store.fetch(0, [1, 2])
    except Exception as error:
        failed.append(type(error))


def test_closing_before_the_reads_of_a_fetch_are_queued(
    packed_checkpoint: Path, slow_reads: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to wait for threads that had ended."""
    reached, go, locate = threading.Event(), threading.Event(), RecordReader.locate

    def held(self: RecordReader, layer: int, expert: int) -> object:
        found = locate(self, layer, expert)
        reached.set()
        go.wait(10)
        return found

    for io in ("mapped", "slots"):
        model, failed = load(packed_checkpoint, io), list[type]()
        with monkeypatch.context() as context:
            context.setattr(RecordReader, "locate", held)
            thread = threading.Thread(target=fetch, args=(model.expert_store, failed), daemon=True)
            thread.start()
            assert reached.wait(10)
            model.close()
            go.set()
            thread.join(10)
        assert not thread.is_alive()
        assert failed == [ModelClosedError]
        reached.clear(), go.clear()
