"""The threads that read: in order, as many as help, nothing lost, and nothing done that was cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from flash_moe.errors import Cancelled, ModelClosedError
from flash_moe.experts.read_queue import ReadQueue, Reads
from flash_moe.experts.threads import Threads

SOON = 10  # seconds until a test fails instead of waiting for ever


class Job:
    """A request that does something."""

    def __init__(self, what: Callable[[], object] = lambda: None, missing: int = 0) -> None:
        self.what, self.missing = what, missing

    def read(self) -> None:
        self.what()


class Gate(Job):
    """A request that begins and does not end before it is let."""

    def __init__(self, missing: int = 0) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        super().__init__(self.wait, missing)

    def wait(self) -> None:
        self.begun.set()
        assert self.open.wait(SOON)


def add(queue: ReadQueue, requests: Sequence[Job]) -> Reads:
    """Adds requests and begins them, also those to copy."""
    reads = queue.add(requests)
    queue.copy()
    return reads


def ended(reads: Reads) -> bool:
    return reads.ended


@pytest.fixture
def queue() -> Iterator[ReadQueue]:
    queue = ReadQueue(in_flight=1, copies=1)
    yield queue
    queue.close()


def test_what_is_asked_for_first_is_read_first(queue: ReadQueue) -> None:
    gate, order = Gate(missing=1), list[int]()
    first = add(queue, [gate])
    assert gate.begun.wait(SOON)
    behind = [
        add(queue, [Job(lambda n=n: order.append(n), missing=1), Job(lambda n=n: order.append(n), missing=1)])
        for n in range(4)
    ]
    assert not ended(first) and not any(ended(reads) for reads in behind)
    gate.open.set()
    for reads in behind:
        reads.wait()
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_disk_is_asked_at_once_and_copies_begin_together(queue: ReadQueue) -> None:
    begun = [threading.Event(), threading.Event()]
    copies = queue.add([Job(begun[0].set)])
    disk = queue.add([Job(begun[1].set, missing=1)])
    assert begun[1].wait(SOON)
    disk.wait()
    assert not begun[0].wait(0.05)
    queue.copy()
    copies.wait()
    assert begun[0].is_set()


def test_what_is_given_up_is_not_read(queue: ReadQueue) -> None:
    gate, done = Gate(missing=5), list[int]()
    half = add(queue, [gate, Job(lambda: done.append(0), missing=7)])
    none = add(queue, [Job(lambda: done.append(1), missing=7)])
    wanted = add(queue, [Job(lambda: done.append(2), missing=7)])
    assert gate.begun.wait(SOON)
    assert none.cancel()
    none.wait()  # does not wait for what is before it
    assert half.cancel()
    assert not ended(half), "one of its reads is under way"
    gate.open.set()
    half.wait()
    wanted.finish()
    assert done == [2]
    assert (half.missing, none.missing, wanted.missing) == (5, 0, 7)
    assert not wanted.cancel(), "it was read whole"
    assert not half.cancel(), "once is enough"
    for reads in (none, half):
        with pytest.raises(Cancelled):
            reads.finish()


def test_reads_of_nothing_have_ended(queue: ReadQueue) -> None:
    for reads in (add(queue, []), queue.do([])):
        assert ended(reads)
        reads.finish()
        assert not reads.cancel()


@pytest.mark.parametrize("here", [True, False])
def test_the_first_failure_is_raised_when_all_have_ended(queue: ReadQueue, here: bool) -> None:
    def fail(words: str) -> None:
        done.append(words)
        raise OSError(words)

    done: list[str] = []
    jobs = [Job(lambda: fail("first")), Job(lambda: fail("second")), Job(lambda: done.append("third"))]
    reads = queue.do(jobs) if here else add(queue, jobs)
    reads.wait()
    with pytest.raises(OSError, match="first"):
        reads.finish()
    assert done == ["first", "second", "third"]
    add(queue, [Job()]).finish()  # a failure is that of its reads alone


@pytest.mark.parametrize("cores", [1, 3, 7])
@pytest.mark.parametrize("first", ["disk", "page cache"])
def test_neither_the_disk_nor_the_cores_wait_for_the_other(cores: int, first: str) -> None:
    queue = ReadQueue(in_flight=4, copies=cores)
    copies, missing = [Gate() for _ in range(9)], [Gate(missing=1) for _ in range(9)]
    gates = missing + copies if first == "disk" else copies + missing
    reads = [add(queue, [gate]) for gate in gates]
    deadline = time.monotonic() + SOON
    while sum(gate.begun.is_set() for gate in gates) < 4 + cores + 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert [gate.begun.is_set() for gate in missing] == 4 * [True] + 5 * [False]
    assert [gate.begun.is_set() for gate in copies] == (cores + 1) * [True] + (8 - cores) * [False]
    for gate in gates:
        gate.open.set()
    for each in reads:
        each.finish()
    queue.close()


@pytest.mark.parametrize("woken", [0, 1])
def test_an_interruption_while_threads_are_woken_leaves_no_read_behind(
    woken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, gates, run, calls = (
        ReadQueue(in_flight=3, copies=1),
        [Gate(missing=1) for _ in range(3)],
        Threads.run,
        list[int](),
    )

    def interrupted(threads: Threads, work: Callable[[], object]) -> None:
        calls.append(1)
        if len(calls) > woken:
            threading.Timer(0.05, gates[0].open.set).start()
            raise KeyboardInterrupt
        run(threads, work)
        assert gates[0].begun.wait(SOON)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Threads, "run", interrupted)
        queue.add(gates)
    assert [gate.begun.is_set() for gate in gates] == [woken == 1, False, False]
    assert gates[0].open.is_set() or not woken, "what had begun was not waited for"
    more = [Gate(missing=1) for _ in range(3)]
    queue.add(more)
    assert all(gate.begun.wait(SOON) for gate in more), "side by side, as ever"
    for gate in more:
        gate.open.set()
    queue.close()


def test_an_interruption_right_after_a_thread_was_woken_lets_no_more_read_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, gate, run = ReadQueue(in_flight=2, copies=1), Gate(missing=1), Threads.run

    def interrupted(threads: Threads, work: Callable[[], object]) -> None:
        run(threads, work)
        assert gate.begun.wait(SOON)
        threading.Timer(0.05, gate.open.set).start()
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Threads, "run", interrupted)
        queue.add([gate])
    more = [Gate(missing=1) for _ in range(3)]
    reads = queue.add(more)
    assert more[0].begun.wait(SOON) and more[1].begun.wait(SOON)
    assert not more[2].begun.wait(0.05)
    for each in more:
        each.open.set()
    reads.wait()
    queue.close()


def test_close_waits_for_what_has_begun_only() -> None:
    queue, gate, done = ReadQueue(in_flight=1, copies=1), Gate(missing=1), list[int]()
    held, behind = add(queue, [gate]), add(queue, [Job(lambda: done.append(1), missing=1)])
    assert gate.begun.wait(SOON)
    threading.Timer(0.05, gate.open.set).start()
    queue.close()
    assert ended(held) and ended(behind)
    assert done == []
    held.finish()
    for call in (behind.finish, lambda: queue.add([Job()]), lambda: queue.do([Job()])):
        with pytest.raises(ModelClosedError):
            call()


def test_a_thread_that_waits_is_told_to_stop() -> None:
    """By closing and by cancelling alike, though the read hangs; the read itself goes on."""
    for stop in ("close", "cancel"):
        queue, gate = ReadQueue(in_flight=1, copies=1), Gate(missing=1)
        reads = add(queue, [gate])
        assert gate.begun.wait(SOON)
        if stop == "close":
            threading.Timer(0.1, queue.close).start()
        else:
            deadline = time.monotonic() + 0.1
            queue.cancelled = lambda deadline=deadline: time.monotonic() > deadline
        start = time.monotonic()
        with pytest.raises(ModelClosedError if stop == "close" else Cancelled):
            reads.finish()
        assert time.monotonic() - start < SOON / 2
        assert not ended(reads)
        gate.open.set()
        reads.drain()
        queue.close()


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_nothing_is_lost(cores: int) -> None:
    """Also where threads run out of work just when more arrives."""
    queue, lock, done = ReadQueue(in_flight=4, copies=cores), threading.Lock(), list[int]()

    def note(number: int) -> None:
        with lock:
            done.append(number)

    for number in range(3000):
        reads = add(queue, [Job(lambda n=number: note(n), missing=number % 3 == 0) for _ in range(number % 4)])
        if number % 5 == 0:
            reads.finish()
        elif number % 7 == 0:
            reads.wait()
    add(queue, [Job()]).wait()
    last = add(queue, [Job(missing=1)])
    last.finish()
    deadline = time.monotonic() + SOON
    while len(done) < sum(n % 4 for n in range(3000)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(done) == [n for n in range(3000) for _ in range(n % 4)]
    queue.close()
