"""Cancels generations: by an event, or when the caller leaves the loop over chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..errors import ArgumentError
from .result import Chunk


class Event(Protocol):
    """The type of ``cancel=``: a ``threading.Event``, or another object with ``is_set()``."""

    def is_set(self) -> bool: ...


class Leaving:
    """An event that is set when the caller leaves a loop, or when another event is set.

    Args:
        other: the other event, or None.
    """

    def __init__(self, other: Event | None) -> None:
        self._other, self._left = cancelled(other), False

    def set(self) -> None:
        """Sets the event."""
        self._left = True

    def is_set(self) -> bool:
        """Returns whether this event or the other one is set."""
        return self._left or (self._other is not None and self._other())


def cancelled(cancel: Event | None) -> Callable[[], bool] | None:
    """Returns a function that tells whether a generation was cancelled; None if it cannot be.

    Raises:
        ArgumentError: ``cancel`` has no ``is_set()``.
    """
    if cancel is None:
        return None
    if not callable(getattr(cancel, "is_set", None)):
        raise ArgumentError(f"cancel is of type {type(cancel).__name__}, expected a threading.Event or one of its kind")
    return cancel.is_set


async def in_thread(chunks: Iterator[Chunk], leaving: Leaving) -> AsyncGenerator[Chunk, None]:
    """Yields chunks that a thread generates. Leaving the loop sets ``leaving`` and waits for the thread to end."""
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "flash_moe astream")
    try:
        while (chunk := await loop.run_in_executor(thread, next, chunks, None)) is not None:
            yield chunk
    finally:
        leaving.set()
        thread.submit(chunks.close)  # type: ignore[attr-defined]
        ending = loop.run_in_executor(None, thread.shutdown)
        await asyncio.shield(ending)
