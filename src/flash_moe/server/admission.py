"""Limits the number of running generations and of waiting requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from .failures import Refusal


class Admission:
    """Admits a number of generations, queues a number of further requests, and rejects the rest.

    Admitted generations take turns after each token: the library runs one step of one sequence at a time.

    Args:
        active: maximum number of running generations. Each holds the caches of its sequence.
        waiting: maximum number of requests that wait for a generation to end.
    """

    def __init__(self, active: int, waiting: int) -> None:
        self._free = anyio.Semaphore(active)
        self._waiting_limit = waiting
        self.active = self.waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place and holds it while the block runs.

        Raises:
            Refusal: with status 429, if the queue is full.
        """
        try:
            self._free.acquire_nowait()
        except anyio.WouldBlock:
            await self._wait()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._free.release()

    async def _wait(self) -> None:
        if self.waiting >= self._waiting_limit:
            raise Refusal(
                429,
                f"{self.active} requests are running and {self.waiting} are waiting; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
