"""Displays progress in a terminal, a notebook or the log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Timer

from ..amounts import format_bytes, format_seconds
from ..checks import shown
from ..errors import ArgumentError
from .progress import Callback, Progress, ProgressOption
from .views import Log, Notebook, Terminal, View, in_notebook, in_terminal

DELAY = 1.0  # seconds before a display appears; most work ends earlier
_WINDOW = 10.0  # seconds over which the speed is measured
_RATED = ("bytes", "tokens")  # units whose speed is displayed


def ask(question: str) -> bool:
    """Asks the user in the terminal. If no user can answer, the answer is yes."""
    if not in_terminal() or sys.stdin is None or not sys.stdin.isatty():
        return True
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def following(progress: ProgressOption = True) -> Iterator[Callback | None]:
    """Yields a callback for each :class:`Progress`; None if progress is off.

    Args:
        progress: True shows bars in a terminal or a notebook, and elsewhere writes log lines from time to time. A
            callable is used directly.

    Raises:
        ArgumentError: ``progress`` is neither a bool nor a callable.
    """
    if progress is True:
        with Display() as display:
            yield display
    elif progress is False:
        yield None
    elif callable(progress):
        yield progress
    else:
        raise ArgumentError(f"progress is {shown(progress)}, expected True, False or a callable that takes a Progress")


class Display:
    """Displays one stage after the other, each only if it takes longer than a second. Several threads can use it."""

    def __init__(self) -> None:
        self._view: View = Terminal() if in_terminal() else Notebook() if in_notebook() else Log()
        self._lock = Lock()
        self._latest: Progress | None = None
        self._start = 0.0
        self._window: deque[tuple[float, int]] = deque()
        self._timer: Timer | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Receives a report."""
        with self._lock:
            now = time.monotonic()
            if self._latest is None or progress.stage != self._latest.stage:
                self._end()
                self._start, self._latest = now, progress
                if self._view.moves:
                    self._timer = Timer(DELAY, self._show_late)
                    self._timer.daemon = True
                    self._timer.start()
            self._latest = progress
            self._window.append((now, progress.done))
            while now - self._window[0][0] > _WINDOW:
                self._window.popleft()
            if now - self._start >= DELAY:
                self._view.show(progress, self._pace())

    def close(self) -> None:
        """Removes the bar. Further calls have no effect."""
        with self._lock:
            self._end()

    def _show_late(self) -> None:
        """Displays a stage that has sent no report since its beginning."""
        with self._lock:
            if self._latest is not None and time.monotonic() - self._start >= DELAY:
                self._view.show(self._latest, self._pace())

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._latest is not None:
            self._view.end(self._latest, time.monotonic() - self._start)
        self._latest, self._timer = None, None
        self._window.clear()

    def _pace(self) -> str:
        """Returns the speed and the remaining time, if they are known."""
        assert self._latest is not None
        if len(self._window) < 2:
            return ""
        (first, before), (last, done) = self._window[0], self._window[-1]
        if done <= before or last - first < DELAY / 2:
            return ""
        rate, unit = (done - before) / (last - first), self._latest.unit
        speed = "" if unit not in _RATED else f" · {format_bytes(rate) if unit == 'bytes' else f'{rate:.0f} {unit}'}/s"
        left = self._latest.total - done
        return f"{speed} · {format_seconds(left / rate)} left" if left else speed
