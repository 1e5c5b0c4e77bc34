"""Handlers of Ctrl-C. In a group, rank 0 ends a pass at a point where all ranks can end it, and the others ignore Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C until the end of the block.

    Yields:
        A function that tells whether Ctrl-C is pending, so that the block can end early. It returns False in threads
            other than the main thread, and if the process ignores Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    held: list[Any] = []
    try:
        with handled_by(lambda *arguments: held.append(arguments)):
            yield lambda: bool(held)
    finally:
        if held and callable(before):
            before(*held[0])


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ignores Ctrl-C inside the block, because Ctrl-C reaches all ranks of a machine at the same time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled_by(signal.SIG_IGN):
        yield


@contextmanager
def deadly_interrupts() -> Iterator[None]:
    """Makes Ctrl-C end the process immediately inside the block, because Python notices it only after MLX returns."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    with handled_by(signal.SIG_DFL):
        yield


@contextmanager
def handled_by(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Gives SIGINT another handler inside the block."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
