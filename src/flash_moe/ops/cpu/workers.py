"""Threads that share the tickets of a job, and spin for a while before they sleep.

A job is a C function ``(arguments, ticket, scratch)`` and a number of tickets; scratch is work memory of the thread.
Threads take one ticket after the other. If the core of a thread is busy with another program, it delays only the ticket
that the thread holds. The number of remaining tickets and the number of the job are in one word, so a late thread
cannot take a ticket of another job.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from ...record import round_up
from . import atomic
from .compiling import function, helper
from .memory import aligned

_WORD, _TICKETS, _FUNCTION, _ARGUMENTS, _DONE, _STOP = 0, 64, 72, 80, 128, 192
_SCRATCH, _SCRATCH_BYTES = 88, 96  # offsets in bytes from the start of a block
_LEFT = (1 << 32) - 1
_SPINS = 20_000  # rounds of spinning before a thread sleeps, about a millisecond
_YIELD = 32  # rounds between yields of the core

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@helper
def _scratch(block: int, thread: int) -> int:
    return atomic.load(block + _SCRATCH) + thread * atomic.load(block + _SCRATCH_BYTES)


@helper
def _take(block: int, thread: int) -> bool:
    """Processes a ticket, if there is one."""
    word = atomic.load(block + _WORD)
    left = word & _LEFT
    if left == 0:
        return False
    tickets = atomic.load(block + _TICKETS)
    function, arguments = atomic.load(block + _FUNCTION), atomic.load(block + _ARGUMENTS)
    if atomic.exchange(block + _WORD, word, word - 1):
        atomic.call3(function, arguments, tickets - left, _scratch(block, thread))
        atomic.add(block + _DONE, 1)
    return True


@helper
def run(block: int, function: int, arguments: int, tickets: int) -> None:
    """Processes all tickets of a job, together with the threads that are awake."""
    if tickets == 1:
        atomic.call3(function, arguments, 0, _scratch(block, 0))
        return
    number = atomic.load(block + _WORD) >> 32
    atomic.store(block + _TICKETS, tickets)
    atomic.store(block + _FUNCTION, function)
    atomic.store(block + _ARGUMENTS, arguments)
    atomic.store(block + _DONE, 0)
    atomic.store(block + _WORD, (number + 1) << 32 | tickets)
    while _take(block, 0):
        pass
    rounds = 0
    while atomic.load(block + _DONE) < tickets:
        rounds += 1
        atomic.pause()
        if rounds % _YIELD == 0:
            _sched_yield()


@function(types.int64, types.int64)
def _serve(block: int, thread: int) -> None:
    """Processes tickets until there have been none for a while."""
    rounds = 0
    while rounds < _SPINS and atomic.load(block + _STOP) == 0:
        if _take(block, thread):
            rounds = 0
            continue
        rounds += 1
        atomic.pause()
        if rounds % _YIELD == 0:
            _sched_yield()


class Workers:
    """A thread pool. Jobs of several callers take turns.

    Args:
        threads: number of threads for a job, including that of the caller.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._turn = threading.RLock()
        self._sleep = _Sleep()
        self.block, self._scratch_bytes = self._sleep.words.ctypes.data, 0
        self._stop = weakref.finalize(self, self._sleep.stop)
        for thread in range(1, threads):
            threading.Thread(target=_live, args=(self._sleep, thread), name="flash-moe-cpu", daemon=True).start()

    def call(self, function: Callable[..., Any], *arguments: Any, scratch: int = 0) -> None:
        """Calls ``function(block, *arguments)``, a Numba function that can :func:`run` jobs.

        Args:
            scratch: bytes of work memory per thread.
        """
        with self._turn:
            if scratch > self._scratch_bytes:
                self._grow(scratch)
            self._sleep.wake()
            function(self.block, *arguments)

    def _grow(self, nbytes: int) -> None:
        nbytes = round_up(nbytes, 4096)
        self._scratch = aligned(self.threads, nbytes, dtype=np.uint8)
        self._scratch_bytes = nbytes
        words = self._sleep.words
        words[_SCRATCH // 8], words[_SCRATCH_BYTES // 8] = self._scratch.ctypes.data, nbytes

    def close(self) -> None:
        """Ends the threads."""
        self._stop()


class _Sleep:
    """The lock that idle threads wait for. It keeps the block alive while a thread reads it."""

    def __init__(self) -> None:
        self.words = aligned(32, dtype=np.int64)
        self.words[:] = 0
        self._asleep, self._lock, self._bell = 0, threading.Lock(), threading.Semaphore(0)

    def wake(self) -> None:
        if self._asleep:
            with self._lock:
                count, self._asleep = self._asleep, 0
            for _ in range(count):
                self._bell.release()

    def stop(self) -> None:
        with self._lock:
            self.words[_STOP // 8] = 1
        self.wake()

    def wait(self) -> bool:
        """Sleeps until there may be work. Returns False after the pool was closed."""
        with self._lock:
            if self.words[_STOP // 8]:
                return False
            self._asleep += 1
        self._bell.acquire()
        return not self.words[_STOP // 8]


def _live(sleep: _Sleep, thread: int) -> None:
    block = sleep.words.ctypes.data
    while sleep.wait():
        _serve(block, thread)


def physical_cores() -> int:
    """Returns the number of physical cores that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, len({_siblings(cpu) for cpu in usable}))


def _siblings(cpu: int) -> str:
    """Returns Linux's list of the hardware threads of a core, or ``cpu`` itself if it is unknown."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


_pools: weakref.WeakValueDictionary[int, Workers] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def workers(threads: int | None = None) -> Workers:
    """Returns the shared pool with this many threads; None means one thread per physical core. It lives as long as it
    is used.
    """
    count = physical_cores() if threads is None else threads
    with _lock:
        if (pool := _pools.get(count)) is None:
            pool = _pools[count] = Workers(count)
        return pool
