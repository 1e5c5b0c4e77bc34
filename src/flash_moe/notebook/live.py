"""Displays a stream while it is generated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from ..progress.views import in_notebook
from . import html

_REDRAW = 0.1  # seconds between two updates of a cell
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Chunk(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def reasoning(self) -> str: ...

    @property
    def tool_calls(self) -> tuple[Any, ...]: ...

    @property
    def tool_result(self) -> Any: ...

    @property
    def stats(self) -> Any: ...


def show(chunks: Iterable[_Chunk]) -> None:
    """Displays a stream of :meth:`flash_moe.Model.stream` or of a conversation while it is generated.

    It writes to the cell of a notebook, or to stdout. Reasoning is dim; in a notebook, it is collapsed when the answer
    begins. Tool calls and their results are in boxes. The last line gives the speed.
    """
    if in_notebook():
        _show_in_cell(chunks)
    else:
        _show_as_text(chunks)


def _show_in_cell(chunks: Iterable[_Chunk]) -> None:
    from IPython.display import display

    parts: list[tuple[str, str]] = []  # parts: reasoning, text, and boxes, which are HTML already
    stats, drawn, handle = None, 0.0, None

    def add(kind: str, piece: str) -> None:
        if parts and parts[-1][0] == kind:
            piece = parts.pop()[1] + piece
        if piece:
            parts.append((kind, piece))

    def draw() -> None:
        nonlocal handle, drawn
        drawn = time.monotonic()
        forms = {"text": html.text, "box": lambda piece: piece}
        shown = "".join(
            html.reasoning(piece, opened=i == len(parts)) if kind == "reasoning" else forms[kind](piece)
            for i, (kind, piece) in enumerate(parts, start=1)
        )
        bundle = {
            "text/html": shown + ("" if stats is None else html.footnote(str(stats))),
            "text/plain": "".join(piece for kind, piece in parts if kind == "text"),
        }
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    try:
        for chunk in chunks:
            add("reasoning", chunk.reasoning)
            add("text", chunk.text)
            add("box", "".join(html.call(call.name, call.arguments) for call in chunk.tool_calls))
            if (found := chunk.tool_result) is not None:
                add("box", html.result(found.name, found.content, found.failed))
            stats = chunk.stats
            if time.monotonic() - drawn >= _REDRAW:
                draw()
    finally:  # the output stays, even if the cell is interrupted
        draw()


def _show_as_text(chunks: Iterable[_Chunk]) -> None:
    terminal = sys.stdout.isatty()
    dim, plain = ("\x1b[2m", "\x1b[0m") if terminal and not os.environ.get("NO_COLOR") else ("", "")
    stats, thinking = None, False

    def write(piece: str, style: str = "") -> None:
        shown = piece.translate(_CONTROL) if terminal else piece  # a model must not control the terminal
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
        if (found := chunk.tool_result) is not None:
            write(f"\n{found.name} → {found.content}\n", dim)
        sys.stdout.flush()
    if stats is not None:
        write("\n")
        write(str(stats), dim)
        write("\n")
