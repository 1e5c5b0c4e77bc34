"""Persistent worker threads that sleep until there is work."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

END_SECONDS = 0.5  # seconds that closing waits for threads; a read from a hanging disk may take longer


class Threads:
    """A thread pool that wakes a thread for each piece of work by releasing a lock.

    Python's ThreadPoolExecutor uses a shared queue and a future for each piece of work. In a fetch that 16 threads copy
    from the page cache in 1.5 ms, that overhead takes a tenth of the time. The threads finish their work and end when
    the pool is freed, and at exit.

    Args:
        name: prefix of the names of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._all: list[_Thread] = []
        self._idle: list[_Thread] = []
        self.close = weakref.finalize(self, _end, self._all)

    def run(self, work: Callable[[], object]) -> None:
        """Runs ``work`` on an idle thread or starts a new one. ``work`` must not raise."""
        try:
            thread = self._idle.pop()
        except IndexError:
            thread = _Thread(f"{self._name}_{len(self._all)}", work, self._idle)
            self._all.append(thread)
            thread.start()
            if not self.close.alive:  # the pool was closed meanwhile
                thread.end()
        else:
            thread.work = work
            thread.wake.release()


class _Thread(threading.Thread):
    """One worker thread. It keeps a reference to its work only while it works."""

    def __init__(self, name: str, work: Callable[[], object], idle: list[_Thread]) -> None:
        super().__init__(name=name, daemon=True)
        self.work: Callable[[], object] | None = work
        self.wake = threading.Lock()  # held while there is no work
        self._idle, self._ending = idle, False

    def run(self) -> None:
        while True:
            self.wake.acquire()
            if self.work is not None:
                self.work()
                self.work = None
            if self._ending:
                return
            self._idle.append(self)

    def end(self) -> None:
        """Ends the thread after its current work."""
        self._ending = True
        with suppress(RuntimeError):  # the thread was woken already
            self.wake.release()


def _end(threads: list[_Thread]) -> None:
    """Tells all threads to end, and waits for them briefly."""
    for thread in threads:
        thread.end()
    deadline = time.monotonic() + END_SECONDS
    for thread in threads:
        # a thread cannot join itself if its work held the last reference; after Ctrl-C, one may not have started
        if thread is not threading.current_thread() and thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))
