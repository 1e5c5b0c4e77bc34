"""Reads that a few threads do side by side, in the order they were asked for, and that can be given up until they begin."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class Request(Protocol):
    """One call to the system.

    Attributes:
        missing: bytes that it reads from outside the page cache, as far as was known when it was made.
    """

    missing: int

    def read(self) -> None:
        """Reads all its bytes, or raises."""
        ...


class ReadQueue:
    """Threads that last, and what they have to do.

    As many work as there are cores, beside those that wait for the disk: more would only be in each other's way. Whoever
    waits for reads is one of them.

    Args:
        in_flight: the most requests that wait for the disk at a time.
        cores: of the processor.
    """

    def __init__(self, in_flight: int, cores: int) -> None:
        self._free_cores, self._free_disk = max(1, cores - 1), in_flight
        self._pool = ThreadPoolExecutor(in_flight + self._free_cores, thread_name_prefix="flash-moe-read")
        self._requests: deque[tuple[Reads, Request]] = deque()
        self.lock = threading.Lock()

    def add(self, requests: Sequence[Request]) -> Reads:
        """Does these after all that were added before."""
        reads = Reads(self, len(requests))
        with self.lock:
            self._requests.extend((reads, request) for request in requests)
        self._start()
        return reads

    def do(self, requests: Sequence[Request]) -> Reads:
        """Does these at once, in this thread."""
        reads = Reads(self, len(requests))
        for request in requests:
            with self.lock:
                reads.begin(request)
            reads.do(request)
        return reads

    def help(self, reads: Reads) -> None:
        """Does what waits, as long as it is only copied out of the page cache, until these reads have ended."""
        while not reads.ended and (taken := self._take(helping=True)) is not None:
            other, request = taken
            try:
                other.do(request)
            except BaseException:  # Ctrl-C: some thread reads it again, whoever wants it
                with self.lock:
                    other.put_back(request)
                    self._requests.appendleft(taken)
                self._start()
                raise

    def close(self) -> None:
        """Gives up what has not begun, and waits for what has."""
        with self.lock:
            waiting, self._requests = self._requests, deque()
        for reads, _ in waiting:
            reads.give_up()
        self._pool.shutdown()

    def _take(self, helping: bool = False) -> tuple[Reads, Request] | None:
        """The next request, unless too many wait for the disk or copy. Who lends a hand waits for no disk."""
        with self.lock:
            while self._requests:
                reads, request = self._requests[0]
                if not (self._free_disk and not helping if request.missing else self._free_cores >= 0 or helping):
                    return None
                self._requests.popleft()
                if reads.begin(request):
                    if request.missing:  # another thread may have this one's core meanwhile
                        self._free_disk -= 1
                        self._free_cores += 1
                    return reads, request
        return None

    def _start(self) -> None:
        """Wakes as many threads as can do something."""
        with self.lock:
            count = max(0, min(len(self._requests), self._free_cores))
            if count and self._requests[0][1].missing:
                count = min(count, self._free_disk)
            self._free_cores -= count
        for _ in range(count):
            self._pool.submit(self._work)

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            self._start()
            reads, request = taken
            reads.do(request)
            if request.missing:
                with self.lock:
                    self._free_disk += 1
                    self._free_cores -= 1
        with self.lock:
            self._free_cores += 1
        self._start()  # what was added since


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

    @property
    def ended(self) -> bool:
        """Whether no request is under way or waiting."""
        return not self._busy.locked()

    def begin(self, request: Request) -> bool:
        """Whether it is still wanted. The caller holds the lock of the queue."""
        if not self._waiting:
            return False
        self._waiting -= 1
        self._running += 1
        self.missing += request.missing
        return True

    def put_back(self, request: Request) -> None:
        """It has not begun after all. The caller holds the lock of the queue."""
        self._waiting += 1
        self._running -= 1
        self.missing -= request.missing

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
        """Lends a hand until all have ended, and raises the first failure."""
        self._queue.help(self)
        self.wait()
        if self._error is not None:
            raise self._error
