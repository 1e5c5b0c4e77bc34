"""The displays of progress: terminal, notebook cell and log."""

from __future__ import annotations

import html
import logging
import shutil
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ..amounts import format_seconds
from .progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

logger = logging.getLogger("flash_moe.progress")
LINE_SECONDS = 60.0  # maximum seconds between two lines of a log
_REDRAW = 0.2  # seconds between two updates of a bar in a notebook


def in_terminal() -> bool:
    """Returns whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def in_notebook() -> bool:
    """Returns whether the code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class View(ABC):
    """A display of progress.

    Attributes:
        moves: whether to display a stage that has sent no report yet.
    """

    moves = False

    @abstractmethod
    def show(self, progress: Progress, pace: str) -> None:
        """Displays a report; ``pace`` begins with a separator or is empty."""

    @abstractmethod
    def end(self, progress: Progress, seconds: float) -> None:
        """Ends the display of a stage, which may not have been displayed yet."""


class Terminal(View):
    """A bar on stderr that disappears at the end."""

    moves = True

    def __init__(self) -> None:
        self._bars: Bars | None = None

    def show(self, progress: Progress, pace: str) -> None:
        state: dict[str, Any] = {
            "description": progress.title, "completed": progress.done, "total": progress.total or None,
            "amount": progress.amount + pace if progress.total else "",
        }  # fmt: skip
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], **state)
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[amount]}", style="dim", markup=False),
            console=Console(stderr=True, width=shutil.get_terminal_size().columns - 4),  # room for a ^C
            expand=True,
            transient=True,
        )
        if progress.note:
            self._bars.console.print(f"{progress.title} {progress.note}", style="dim", markup=False, highlight=False)
        self._bars.add_task(**state)
        self._bars.start()

    def end(self, progress: Progress, seconds: float) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class Notebook(View):
    """A bar of plain HTML without widgets, so that saved and exported notebooks show it. A line remains at the end."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0

    def show(self, progress: Progress, pace: str) -> None:
        now = time.monotonic()
        if self._handle is None or now - self._drawn >= _REDRAW:
            self._drawn = now
            self._draw(f"{progress}{pace}", bar_html(progress, pace))

    def end(self, progress: Progress, seconds: float) -> None:
        if self._handle is not None:
            amount = progress.amount if progress.share < 1 else progress.amount.partition(" of ")[2]
            line = f"{progress.title}: {amount} in {format_seconds(seconds)}"
            self._draw(line, f'<div style="font-size:85%;opacity:.65">{html.escape(line)}</div>')
            self._handle = None

    def _draw(self, text: str, markup: str) -> None:
        from IPython.display import display

        bundle = {"text/plain": text, "text/html": markup}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def bar_html(progress: Progress, pace: str) -> str:
    """Returns a bar with a line of text, in the colours of the page."""
    note = f'<div style="opacity:.65">{html.escape(progress.note)}</div>' if progress.note else ""
    return (
        f'<div style="font-size:85%;max-width:48em">{html.escape(progress.title)} '
        f'<span style="opacity:.65">{html.escape(progress.amount + pace)}</span>'
        '<div style="height:5px;border-radius:3px;margin:.35em 0;background:rgba(128,128,128,.3)">'
        f'<div style="height:5px;border-radius:3px;background:#3584e4;width:{progress.share:.1%}"></div></div>{note}</div>'
    )


class Log(View):
    """A log line for every tenth of the work, and at least one per minute."""

    def __init__(self) -> None:
        self._tenth, self._last = 0, 0.0

    def show(self, progress: Progress, pace: str) -> None:
        now = time.monotonic()
        tenth = int(10 * progress.share)
        if tenth > self._tenth or (self._last and now - self._last >= LINE_SECONDS):
            self._tenth, self._last = tenth, now
            logger.info("%s%s", progress, pace)
        self._last = self._last or now

    def end(self, progress: Progress, seconds: float) -> None:
        self._tenth, self._last = 0, 0.0
