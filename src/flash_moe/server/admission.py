"""Limits how many generations run at a time, and how many may wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from .failures import Refusal


class Admission:
    """Admits some generations, lets some more wait in a queue, and refuses the rest.

    Generations that are admitted take turns token by token: the library runs one step of one sequence at a time.

    Args:
        active: generations that run at the same time; each holds the caches of its sequence.
        waiting: requests that may wait for one of them to end.
    """

    def __init__(self, active: int, waiting: int) -> None:
        self._free = anyio.Semaphore(active)
        self._waiting_limit = waiting
        self.active = self.waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place while a generation runs.

        Raises:
            Refusal: 429, if as many requests wait as may.
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
