"""Ctrl-C in a group: rank 0 leaves a pass where all ranks can leave it, and the others leave Ctrl-C to rank 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back until the block ends, so that it comes at no arbitrary point within.

    Yields:
        Whether one is held, so that the block can end early. There are none in other threads than the main one, nor
        where the process ignores them.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield lambda: bool(held)
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if held and callable(before):
            before(*held[0])


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ignores Ctrl-C, which on one machine reaches all ranks at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
