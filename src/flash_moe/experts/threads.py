"""Worker threads that last and sleep until there is work."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

END_SECONDS = 0.5  # that closing waits for threads: a read from a disk that hangs ends when it likes


class Threads:
    """Wakes a thread for each piece of work, at the price of releasing a lock.

    An executor's thread takes work from a queue that all share, and tells a future how it ended: of a fetch that 16
    threads copy out of the page cache in 1.5 ms, that alone takes a tenth. When nothing refers to these threads any more,
    and at exit, they finish what they do and end.

    Args:
        name: what the names of the threads begin with.
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
            if not self.close.alive:  # it was closed meanwhile
                thread.end()
        else:
            thread.work = work
            thread.wake.release()


class _Thread(threading.Thread):
    """One of them. It refers to what it works for only while it works."""

    def __init__(self, name: str, work: Callable[[], object], idle: list[_Thread]) -> None:
        super().__init__(name=name, daemon=True)
        self.work: Callable[[], object] | None = work
        self.wake = threading.Lock()  # held while there is nothing to do
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
        """Ends it when its work is done."""
        self._ending = True
        with suppress(RuntimeError):  # it was woken already
            self.wake.release()


def _end(threads: list[_Thread]) -> None:
    """Tells all threads to end, and waits a moment for them."""
    for thread in threads:
        thread.end()
    deadline = time.monotonic() + END_SECONDS
    for thread in threads:
        # the last reference may have been that of a thread's own work; and Ctrl-C may have come before one was started
        if thread is not threading.current_thread() and thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))
