"""Reads that threads do side by side, in the order they were asked for, and that can be given up until they begin."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from .threads import Threads


class Request(Protocol):
    """One call to the system.

    Attributes:
        missing: bytes that it reads from outside the page cache, as far as was known when it was made.
    """

    missing: int

    def read(self) -> None:
        """Reads all its bytes, or raises."""
        ...


_Taken = tuple["Reads", Request]


class _Lane:
    """Requests in line, and how many more threads there may be to do them. The caller holds the lock of the queue."""

    def __init__(self, threads: int) -> None:
        self.waiting: deque[_Taken] = deque()
        self.free = self._most = threads

    def leave(self, threads: int) -> None:
        """So many do nothing more. Where Ctrl-C left it open whether one was woken, it is counted twice here."""
        self.free = min(self.free + threads, self._most)


class ReadQueue:
    """Two lanes of requests: those that wait for the disk, and those that are only copied out of the page cache.

    So that the disk has enough to do, and hardly more threads copy than there are cores: more would only be in each other's
    way. In each lane, first come, first served.

    Args:
        in_flight: the most requests that wait for the disk at a time.
        cores: of the processor.
    """

    def __init__(self, in_flight: int, cores: int) -> None:
        self._disk, self._page_cache = _Lane(in_flight), _Lane(cores + 1)  # one is ready when another is held up
        self._threads = Threads("flash-moe-read")
        self.lock = threading.Lock()

    def add(self, requests: Sequence[Request]) -> Reads:
        """Does these after all that were added before; what is only to be copied, once :meth:`copy` is called."""
        reads = Reads(self, len(requests))
        try:
            with self.lock:
                for request in requests:
                    lane = self._disk if request.missing else self._page_cache
                    lane.waiting.append((reads, request))
            self._wake(self._disk)
        except BaseException:  # Ctrl-C: nobody will know of these, and their memory may be used for others
            reads.stop()
            raise
        return reads

    def copy(self) -> None:
        """Begins to copy. Each thread that does takes the interpreter from the one that is still preparing requests."""
        self._wake(self._page_cache)

    def do(self, requests: Sequence[Request]) -> Reads:
        """Does these at once, in this thread."""
        reads = Reads(self, len(requests))
        for request in requests:
            with self.lock:
                reads.begin(request)
            reads.do(request)
        return reads

    def close(self) -> None:
        """Gives up what has not begun, and waits for what has."""
        for lane in (self._disk, self._page_cache):
            with self.lock:
                waiting, lane.waiting = lane.waiting, deque()
            for reads, _ in waiting:
                reads.give_up()
        self._threads.close()

    def _take(self, lane: _Lane) -> _Taken | None:
        """The next request that is still wanted. Where there is none, the thread that asks has left the lane."""
        with self.lock:
            while lane.waiting:
                reads, request = lane.waiting.popleft()
                if reads.begin(request):
                    return reads, request
            lane.leave(1)
        return None

    def _wake(self, lane: _Lane) -> None:
        """As many threads as can do something."""
        left = 0
        try:
            with self.lock:
                left = min(len(lane.waiting), lane.free)
                lane.free -= left
            while left:
                self._threads.run(partial(self._work, lane))
                left -= 1
        except BaseException:  # Ctrl-C, or no more threads are to be had
            with self.lock:
                lane.leave(left)
            raise

    def _work(self, lane: _Lane) -> None:
        while (taken := self._take(lane)) is not None:
            reads, request = taken
            reads.do(request)


class Reads:
    """How far the requests for one record have come.

    Attributes:
        missing: bytes outside the page cache that the requests that have begun were to read.
    """

    __slots__ = ("_busy", "_error", "_queue", "_running", "_waiting", "missing")

    def __init__(self, queue: ReadQueue, requests: int) -> None:
        self.missing = 0
        self._queue, self._waiting, self._running = queue, requests, 0
        self._error: Exception | None = None
        self._busy = threading.Lock()  # held until all have ended
        if requests:
            self._busy.acquire()

    def begin(self, request: Request) -> bool:
        """Whether it is still wanted. The caller holds the lock of the queue."""
        if not self._waiting:
            return False
        self._waiting -= 1
        self._running += 1
        self.missing += request.missing
        return True

    def do(self, request: Request) -> None:
        """Does a request that has begun; its failure is kept for :meth:`finish`."""
        try:
            request.read()
        except Exception as error:
            self._error = self._error or error
        with self._queue.lock:
            self._running -= 1
            if not self._waiting and not self._running:
                self._busy.release()

    def give_up(self) -> bool:
        """Whether some had not begun: they never will, and the record is not read whole."""
        with self._queue.lock:
            incomplete, self._waiting = bool(self._waiting), 0
            if incomplete and not self._running:
                self._busy.release()
        return incomplete

    def wait(self) -> None:
        """Until all have ended, whether they succeeded or not."""
        with self._busy:
            pass

    def stop(self) -> None:
        """Gives up what has not begun, and waits for what has."""
        self.give_up()
        self.wait()

    def finish(self) -> None:
        """Waits until all have ended, and raises the first failure."""
        self.wait()
        if self._error is not None:
            raise self._error
