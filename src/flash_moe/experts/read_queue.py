"""A queue of reads for worker threads. Reads begin in order, and can be cancelled before they begin."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ..errors import Cancelled, ModelClosedError
from .threads import Threads

CHECK = 0.05  # seconds after which a thread that waits for a read checks for cancellation


class Request(Protocol):
    """One read of a file. While it runs, it keeps its file open and its memory allocated.

    Attributes:
        missing: bytes outside the page cache, as known when the request was created.
    """

    missing: int

    def read(self) -> None:
        """Reads all bytes of the request, or raises an error."""
        ...


_Taken = tuple["Reads", Request]


class _Lane:
    """A queue of requests, and the number of further threads that may process them.

    The caller holds the lock of the queue.
    """

    def __init__(self, threads: int) -> None:
        self.waiting: deque[_Taken] = deque()
        self.free = self._most = threads

    def leave(self, threads: int) -> None:
        """Returns a number of threads to the lane.

        If Ctrl-C left it unclear whether a thread was woken, it is counted twice here.
        """
        self.free = min(self.free + threads, self._most)


class ReadQueue:
    """A queue with two lanes: requests that wait for the disk, and requests that only copy from the page cache.

    One lane keeps the disk busy. In the other, there are hardly more threads than can copy at full speed. In each lane,
    requests are processed in order.

    Args:
        in_flight: maximum number of requests that wait for the disk at the same time.
        copies: number of copies that run at full speed at the same time.

    Attributes:
        cancelled: function that is called while a thread waits for reads. If it returns True, the wait ends with
            :class:`Cancelled`.
    """

    def __init__(self, in_flight: int, copies: int) -> None:
        self._disk, self._page_cache = _Lane(in_flight), _Lane(copies + 1)  # a spare thread for when another is delayed
        self._threads = Threads("flash-moe-read")
        self._closed = False
        self.lock = threading.Lock()
        self.cancelled: Callable[[], bool] | None = None

    def check(self) -> None:
        """Raises an error if waiting threads must stop.

        Raises:
            ModelClosedError: the queue was closed.
            Cancelled: the caller cancelled the work.
        """
        if self._closed:
            raise ModelClosedError
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the fetch was cancelled")

    def add(self, requests: Sequence[Request]) -> Reads:
        """Queues requests behind all others. Requests that only copy begin after a call of :meth:`copy`.

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
        except BaseException:  # Ctrl-C: the caller will not know these requests, and may reuse their memory
            reads.cancel()
            reads.drain()
            raise
        return reads

    def copy(self) -> None:
        """Starts the copies.

        Call it after all requests of a fetch are queued, because copying threads compete for the GIL.
        """
        self._wake(self._page_cache)

    def do(self, requests: Sequence[Request]) -> Reads:
        """Processes requests immediately in this thread.

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
        """Cancels requests that have not begun. All waiting threads raise :class:`ModelClosedError`.

        It waits briefly for running reads. A read that takes longer ends later by itself.
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
        """Returns the next request that is not cancelled. If there is none, the calling thread leaves the lane."""
        with self.lock:
            while lane.waiting:
                reads, request = lane.waiting.popleft()
                if reads.begin(request):
                    return reads, request
            lane.leave(1)
        return None

    def _wake(self, lane: _Lane) -> None:
        """Wakes a thread for each waiting request, up to the limit of the lane."""
        left = 0
        try:
            with self.lock:
                left = min(len(lane.waiting), lane.free)
                lane.free -= left
            while left:
                self._threads.run(partial(self._work, lane))
                left -= 1
        except BaseException:  # Ctrl-C, or the system allows no more threads
            with self.lock:
                lane.leave(left)
            raise

    def _work(self, lane: _Lane) -> None:
        while (taken := self._take(lane)) is not None:
            reads, request = taken
            reads.do(request)


class Reads:
    """The state of all requests for one record.

    Attributes:
        missing: bytes outside the page cache in the requests that have begun.
        ended: whether all begun requests have ended and no further one will begin.
    """

    __slots__ = ("_busy", "_cancelled", "_error", "_queue", "_running", "_waiting", "ended", "missing")

    def __init__(self, queue: ReadQueue, requests: int) -> None:
        self.missing = 0
        self.ended = not requests
        self._queue, self._waiting, self._running = queue, requests, 0
        self._error: Exception | None = None
        self._cancelled = False
        self._busy = threading.Lock()  # held until all requests have ended
        if requests:
            self._busy.acquire()

    def begin(self, request: Request) -> bool:
        """Marks a request as begun, unless it was cancelled; returns whether it begins.

        The caller holds the lock of the queue.
        """
        if not self._waiting:
            return False
        self._waiting -= 1
        self._running += 1
        self.missing += request.missing
        return True

    def do(self, request: Request) -> None:
        """Processes a request that has begun. An error is kept for :meth:`finish`."""
        try:
            request.read()
        except Exception as error:
            self._error = self._error or error
        with self._queue.lock:
            self._running -= 1
            self._end_if_idle()

    def cancel(self) -> bool:
        """Cancels the requests that have not begun.

        Returns whether there were any, so that the record is incomplete.
        """
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
        """Waits until all requests have ended, successfully or not.

        Raises:
            ModelClosedError, Cancelled: see :meth:`ReadQueue.check`; a request may still be running.
        """
        while not self._wait():
            self._queue.check()

    def drain(self) -> None:
        """Waits until all requests have ended, even if the queue is closed or the work cancelled."""
        while not self._wait():
            pass

    def _wait(self) -> bool:
        # After Ctrl-C the lock may stay held, so only the attribute tells whether all have ended.
        if not self.ended and self._busy.acquire(timeout=CHECK):
            self._busy.release()
        return self.ended

    def stop(self) -> None:
        """Cancels requests that have not begun, and waits for the others as :meth:`wait` does."""
        self.cancel()
        self.wait()

    def finish(self) -> None:
        """Waits until all requests have ended, and raises the first error.

        Raises:
            Exception: the error of the first failed request.
            Cancelled: some requests were cancelled, so the record is incomplete.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        if self._cancelled:
            self._queue.check()
            raise Cancelled("the read was cancelled")
