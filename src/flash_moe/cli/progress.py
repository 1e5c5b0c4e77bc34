"""Shows on stderr how far a long piece of work is."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta
from threading import Lock, Timer
from types import TracebackType
from typing import TYPE_CHECKING

from .console import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.progress import Progress

DELAY = 1.0  # seconds before anything shows: most work is done by then
_SKIPPING = 0.5  # seconds in which work that was done in an earlier run is passed over


class Bar:
    """A bar on a terminal that disappears at the end; elsewhere, if asked for, a line for every tenth of the work.

    Args:
        what: is being done; may change on the way.
        lines: write lines where stderr is no terminal.
        resumed: some of the work is done already; it does not count for the speed.
    """

    def __init__(self, what: str, *, lines: bool = False, resumed: bool = False) -> None:
        self.what, self._lines, self._resumed = what, lines, resumed
        self._amount, self._done, self._total = "", 0, 0
        self._start = time.monotonic()
        self._base: tuple[float, int] | None = None
        self._next_line = 0.1
        self._lock, self._closed = Lock(), False
        self._progress: Progress | None = None
        self._timer = Timer(DELAY, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; doing it again is fine."""
        with self._lock:
            self._timer.cancel()
            self._closed = True
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def count(self, done: int, total: int, unit: str) -> None:
        """``done`` of ``total`` things are done."""
        self._update(done, total, f"{done:,} of {total:,} {unit}")

    def bytes(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are done; shows the speed and the time left too."""
        from ..generation.summary import format_bytes

        now = time.monotonic()
        if self._base is None or (self._resumed and now - self._start < _SKIPPING):
            self._base = now, done
        amount = f"{format_bytes(done)} of {format_bytes(total)}"
        speed = (done - self._base[1]) / max(now - self._base[0], 1e-9)
        if speed:
            amount += f" · {format_bytes(speed)}/s · {timedelta(seconds=round((total - done) / speed))} left"
        self._update(done, total, amount)

    def _update(self, done: int, total: int, amount: str) -> None:
        with self._lock:
            self._done, self._total, self._amount = done, total, amount
            if self._progress is not None:
                task = self._progress.task_ids[0]
                self._progress.update(task, description=self.what, completed=done, total=total, amount=amount)
            elif self._lines and not sys.stderr.isatty() and done >= self._next_line * total:
                self._next_line = done / max(total, 1) + 0.1
                if time.monotonic() - self._start >= DELAY:
                    say(f"{self.what}: {done / max(total, 1):.0%} · {amount}")

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        with self._lock:
            if self._closed:
                return
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[amount]}", style="dim"),
                console=Console(stderr=True, width=shutil.get_terminal_size().columns - 4),  # room for a ^C
                expand=True,
                transient=True,
            )
            self._progress.add_task(self.what, completed=self._done, total=self._total or None, amount=self._amount)
            self._progress.start()


class Bars:
    """A bar for every stage of some work, one after the other; called as ``progress(stage, done, total)``.

    Args:
        stages: by name, what is being done and of what units.
    """

    def __init__(self, stages: Mapping[str, tuple[str, str]]) -> None:
        self._stages, self._stage = stages, ""
        self._bar: Bar | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        what, unit = self._stages[stage]
        if self._bar is None or stage != self._stage:
            self.__exit__(None, None, None)
            self._stage, self._bar = stage, Bar(what, lines=True).__enter__()
        self._bar.count(done, total, unit)
