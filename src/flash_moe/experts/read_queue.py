"""Reads that worker threads do side by side, in the order they were queued, and that can be cancelled until they begin."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ..errors import Cancelled, ModelClosedError
from .threads import Threads

CHECK = 0.05  # seconds after which a thread that waits for a read looks whether it still should


class Request(Protocol):
    """One call to the system. While it is under way it keeps its file open and its memory allocated.

    Attributes:
        missing: bytes that it reads from outside the page cache, as far as was known when it was made.
    """

    missing: int

    def read(self) -> None:
        """Reads all its bytes, or raises."""
        ...


_Taken = tuple["Reads", Request]


class _Lane:
    """Queued requests, and how many more threads may do them. The caller holds the lock of the queue."""

    def __init__(self, threads: int) -> None:
        self.waiting: deque[_Taken] = deque()
        self.free = self._most = threads

    def leave(self, threads: int) -> None:
        """Takes back this many threads. Where Ctrl-C left it open whether one was woken, it is counted twice here."""
        self.free = min(self.free + threads, self._most)


class ReadQueue:
    """Two lanes of requests: those that wait for the disk, and those that are only copied out of the page cache.

    The disk has enough to do, and hardly more threads copy than there are cores: more would only be in each other's
    way. In each lane, first come, first served.

    Args:
        in_flight: the most requests that wait for the disk at a time.
        cores: of the processor.

    Attributes:
        cancelled: asked while a thread waits for reads; where it says yes, waiting ends with :class:`Cancelled`.
    """

    def __init__(self, in_flight: int, cores: int) -> None:
        self._disk, self._page_cache = _Lane(in_flight), _Lane(cores + 1)  # one is ready when another is held up
        self._threads = Threads("flash-moe-read")
        self._closed = False
        self.lock = threading.Lock()
        self.cancelled: Callable[[], bool] | None = None

    def check(self) -> None:
        """Raises where nobody should wait any more.

        Raises:
            ModelClosedError: the queue was closed.
            Cancelled: the caller no longer wants what is read.
        """
        if self._closed:
            raise ModelClosedError
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the fetch was cancelled")

    def add(self, requests: Sequence[Request]) -> Reads:
        """Queues requests behind all others; what is only to be copied begins once :meth:`copy` is called.

        Raises:
            ModelClosedError: the queue was closed.
        """
        reads = Reads(self, len(requests))
        try:
            with self.lock:
                if self._closed:
                    raise ModelClosedError
                for request in requests:
                    lane = self._disk if request.missing else self._page_cache
                    lane.waiting.append((reads, request))
            self._wake(self._disk)
        except BaseException:  # Ctrl-C: nobody will know of these, and their memory may be used for others
            reads.cancel()
            reads.drain()
            raise
        return reads

    def copy(self) -> None:
        """Starts the copies. Each thread that copies takes the interpreter from the one that still prepares requests."""
        self._wake(self._page_cache)

    def do(self, requests: Sequence[Request]) -> Reads:
        """Does requests at once, in this thread.

        Raises:
            ModelClosedError: the queue was closed.
        """
        reads = Reads(self, len(requests))
        for request in requests:
            with self.lock:
                if self._closed:
                    raise ModelClosedError
                reads.begin(request)
            reads.do(request)
        return reads

    def close(self) -> None:
        """Cancels what has not begun, and has every thread that waits raise :class:`ModelClosedError`.

        Reads under way are waited for a moment; one that takes longer ends by itself.
        """
        with self.lock:
            self._closed = True
            waiting = [reads for lane in (self._disk, self._page_cache) for reads, _ in lane.waiting]
            for lane in (self._disk, self._page_cache):
                lane.waiting.clear()
        for reads in waiting:
            reads.cancel()
        self._threads.close()

    def _take(self, lane: _Lane) -> _Taken | None:
        """Returns the next request that is still wanted. Where there is none, the thread that asks has left the lane."""
        with self.lock:
            while lane.waiting:
                reads, request = lane.waiting.popleft()
                if reads.begin(request):
                    return reads, request
            lane.leave(1)
        return None

    def _wake(self, lane: _Lane) -> None:
        """Wakes as many threads as can do something."""
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
    """The state of the requests for one record.

    Attributes:
        missing: bytes outside the page cache that the requests that have begun were to read.
        ended: whether all requests that have begun have ended, and no further one will begin.
    """

    __slots__ = ("_busy", "_cancelled", "_error", "_queue", "_running", "_waiting", "ended", "missing")

    def __init__(self, queue: ReadQueue, requests: int) -> None:
        self.missing = 0
        self.ended = not requests
        self._queue, self._waiting, self._running = queue, requests, 0
        self._error: Exception | None = None
        self._cancelled = False
        self._busy = threading.Lock()  # held until all have ended
        if requests:
            self._busy.acquire()

    def begin(self, request: Request) -> bool:
        """Returns whether a request is still wanted. The caller holds the lock of the queue."""
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
            self._end_if_idle()

    def cancel(self) -> bool:
        """Cancels the requests that have not begun. Returns whether there were any: the record is not read whole then."""
        with self._queue.lock:
            incomplete, self._waiting = bool(self._waiting), 0
            if incomplete:
                self._cancelled = True
                self._end_if_idle()
        return incomplete

    def _end_if_idle(self) -> None:
        if not self._waiting and not self._running:
            self.ended = True
            self._busy.release()

    def wait(self) -> None:
        """Waits until all have ended, whether they succeeded or not.

        Raises:
            ModelClosedError, Cancelled: see :meth:`ReadQueue.check`; a request may still be under way.
        """
        while not self._wait():
            self._queue.check()

    def drain(self) -> None:
        """Waits until all have ended, whatever happens."""
        while not self._wait():
            pass

    def _wait(self) -> bool:
        # After Ctrl-C the lock may stay held: that all have ended is decided by the attribute alone.
        if not self.ended and self._busy.acquire(timeout=CHECK):
            self._busy.release()
        return self.ended

    def stop(self) -> None:
        """Cancels what has not begun, and waits for what has, as :meth:`wait`."""
        self.cancel()
        self.wait()

    def finish(self) -> None:
        """Waits until all have ended, as :meth:`wait`.

        Raises:
            Exception: the first failure.
            Cancelled: some requests were cancelled, so the record was not read whole.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        if self._cancelled:
            self._queue.check()
            raise Cancelled("the read was cancelled")
