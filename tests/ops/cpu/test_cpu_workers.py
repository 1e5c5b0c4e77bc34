"""Threads of the CPU's kernels: every ticket once, whoever takes it; and they end."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import carray

from flash_moe.ops.cpu import workers as module
from flash_moe.ops.cpu.atomic import add
from flash_moe.ops.cpu.compiling import function, kernel, types
from flash_moe.ops.cpu.rows import pointer
from flash_moe.ops.cpu.workers import Workers, run, workers


@kernel(3)
def _count(arguments, ticket, scratch):  # type: ignore[no-untyped-def]
    add(arguments + 8 * ticket, 1)
    carray(pointer(scratch), 1, np.int64)[0] = ticket


@function(*(types.int64,) * 4)
def _run(block, job, arguments, tickets):  # type: ignore[no-untyped-def]
    run(block, job, arguments, tickets)


def counted(pool: Workers, tickets: int) -> np.ndarray:
    counts = np.zeros(tickets, np.int64)
    pool.call(_run, _count.address, counts.ctypes.data, tickets, scratch=64)
    return counts


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_ticket_is_done_once(threads: int) -> None:
    pool = Workers(threads)
    for tickets in (1, 2, 3, 100, 5000):
        assert (counted(pool, tickets) == 1).all()
    pool.close()


def test_after_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Workers(2)
    for _ in range(3):
        assert (counted(pool, 500) == 1).all()
        time.sleep(0.05)  # long enough for the other thread to fall asleep
    pool.close()


def test_callers_take_turns() -> None:
    pool, wrong = Workers(2), []

    def call() -> None:
        wrong.extend(tickets for tickets in range(2, 200) if (counted(pool, tickets) != 1).any())

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []
    pool.close()


def test_threads_end_with_the_last_who_keeps_the_pool() -> None:
    gc.collect()
    before = set(threading.enumerate())  # those of earlier tests may end meanwhile
    pool = workers(3)
    assert workers(3) is pool
    own = [thread for thread in threading.enumerate() if thread not in before]
    assert [thread.name for thread in own] == ["flash-moe-cpu"] * 2
    counted(pool, 100)
    del pool
    gc.collect()
    for thread in own:
        thread.join(2)
    assert not any(thread.is_alive() for thread in own)


def test_physical_cores_is_sensible() -> None:
    assert 1 <= module.physical_cores() <= 1024
