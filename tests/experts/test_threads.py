"""Threads end when nobody needs them any more, and not before their work is done."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

from flash_moe.experts.threads import Threads

SOON = 10  # seconds until a test fails instead of waiting for ever


def names() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("test-"))


def wait_for(expected: list[str]) -> None:
    deadline = time.monotonic() + SOON
    while names() != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    assert names() == expected


def test_an_idle_thread_works_again() -> None:
    threads, done = Threads("test-idle"), list[str]()
    for number in range(1, 4):
        threads.run(lambda: done.append(threading.current_thread().name))
        deadline = time.monotonic() + SOON
        while not (len(done) == number and threads._idle) and time.monotonic() < deadline:
            time.sleep(0.001)
    assert done == 3 * ["test-idle_0"]
    threads.close()
    assert names() == []


def test_work_is_done_side_by_side() -> None:
    threads, together, done = Threads("test-side"), threading.Barrier(3), list[int]()
    for _ in range(3):
        threads.run(lambda: done.append(together.wait(SOON)))
    threads.close()
    assert sorted(done) == [0, 1, 2]


def test_close_waits_for_the_work() -> None:
    threads, done = Threads("test-close"), list[int]()

    def work() -> None:
        time.sleep(0.05)
        done.append(1)

    for _ in range(3):
        threads.run(work)
    threads.close()
    assert done == [1, 1, 1]
    assert names() == []
    threads.close()  # once more does nothing


def test_threads_that_nobody_refers_to_end() -> None:
    threads = Threads("test-forgotten")
    for _ in range(3):
        threads.run(lambda: None)
    assert names()
    del threads
    gc.collect()
    wait_for([])


def test_the_last_reference_may_be_that_of_the_work() -> None:
    class Owner:
        def __init__(self) -> None:
            self.threads = Threads("test-own")
            self.threads.run(self.work)

        def work(self) -> None:
            assert go.wait(SOON)

    go = threading.Event()
    Owner()
    gc.collect()
    assert names() == ["test-own_0"]
    go.set()
    wait_for([])


def test_a_program_ends_when_the_work_is_done() -> None:
    program = """
import time
from flash_moe.experts.threads import Threads

threads = Threads("test")
threads.run(lambda: None)
time.sleep(0.05)  # one is idle
threads.run(lambda: (time.sleep(0.2), print("done", flush=True)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
