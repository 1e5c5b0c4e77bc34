"""Shows a stream while it is written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from ..progress.views import in_notebook
from . import html

_REDRAW = 0.1  # seconds between two states of a cell
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Chunk(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def reasoning(self) -> str: ...

    @property
    def tool_calls(self) -> tuple[Any, ...]: ...

    @property
    def stats(self) -> Any: ...


def show(chunks: Iterable[_Chunk]) -> None:
    """Shows what :meth:`flash_moe.Model.stream` yields while it comes: in the cell of a notebook, or on stdout.

    Reasoning is dim, and folded away in a notebook once the answer begins; tool calls are boxes; the last line says how
    fast it was.
    """
    if in_notebook():
        _show_in_cell(chunks)
    else:
        _show_as_text(chunks)


def _show_in_cell(chunks: Iterable[_Chunk]) -> None:
    from IPython.display import display

    thought, said, calls, stats, drawn, handle = "", "", "", None, 0.0, None

    def draw() -> None:
        nonlocal handle, drawn
        drawn = time.monotonic()
        line = "" if stats is None else html.footnote(str(stats))
        bundle = {
            "text/html": html.reasoning(thought, opened=not said and not calls) + html.text(said) + calls + line,
            "text/plain": said,
        }
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    try:
        for chunk in chunks:
            thought, said, stats = thought + chunk.reasoning, said + chunk.text, chunk.stats
            calls += "".join(html.call(call.name, call.arguments) for call in chunk.tool_calls)
            if time.monotonic() - drawn >= _REDRAW:
                draw()
    finally:  # what came stays, also where the cell is interrupted
        draw()


def _show_as_text(chunks: Iterable[_Chunk]) -> None:
    terminal = sys.stdout.isatty()
    dim, plain = ("\x1b[2m", "\x1b[0m") if terminal and not os.environ.get("NO_COLOR") else ("", "")
    stats, thinking = None, False

    def write(piece: str, style: str = "") -> None:
        shown = piece.translate(_CONTROL) if terminal else piece  # escape sequences of a model must not drive it
        sys.stdout.write(f"{style}{shown}{plain if style else ''}")

    for chunk in chunks:
        stats = chunk.stats
        if chunk.reasoning:
            write(chunk.reasoning, dim)
            thinking = True
        if (chunk.text or chunk.tool_calls) and thinking:
            write("\n\n")
            thinking = False
        write(chunk.text)
        for call in chunk.tool_calls:
            write(f"\n{call.name}({call.arguments})")
        sys.stdout.flush()
    if stats is not None:
        write("\n")
        write(str(stats), dim)
        write("\n")
