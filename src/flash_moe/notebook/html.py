"""HTML of replies, conversations and tables. Content from a model or a user is always text, never markup.

Colours are shades of those of the page, so that they fit light and dark pages. There are no style sheets and no
scripts, so that exported and untrusted notebooks look the same.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_DIM = "opacity:.65"
_BOX = "border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:.3em .6em;margin:.4em 0"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"
_CODE = "font-family:ui-monospace,monospace;font-size:90%"
_MARKS = {"user": "#3584e4", "assistant": "#2ea043", "tool": "#b58900", "system": "#8a63d2"}


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names and values."""
    cells = "".join(
        f'<tr style="background:transparent"><td style="text-align:left;padding:.1em 1em .1em 0;{_DIM}">{html.escape(name)}'
        f'</td><td style="text-align:left;padding:.1em 0">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table style="border-collapse:collapse;margin:.3em 0;font-size:90%">{cells}</table>'


def text(content: str, style: str = "") -> str:
    """Returns text with its white space preserved."""
    return f'<div style="{_TEXT};{style}">{html.escape(content)}</div>' if content else ""


def reasoning(content: str | None, *, opened: bool = False) -> str:
    """Returns reasoning in a collapsible section, closed by default."""
    if not content:
        return ""
    return (
        f'<details style="margin:.3em 0;{_DIM}"{" open" if opened else ""}><summary>reasoning</summary>'
        f"{text(content, 'border-left:2px solid rgba(128,128,128,.4);padding-left:.8em;margin:.3em 0')}</details>"
    )


def call(name: str, arguments: Mapping[str, Any] | str) -> str:
    """Returns a tool call in a box."""
    given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return f'<div style="{_BOX};{_CODE};{_TEXT}"><b>{html.escape(name)}</b> {html.escape(given)}</div>'


def result(name: str, content: str, failed: bool) -> str:
    """Returns the result of a tool call in a box."""
    edge = "border-color:#c44e52;" if failed else ""
    return f'<div style="{_BOX};{edge}{_CODE};{_TEXT}"><b>{html.escape(name)}</b> → {html.escape(content)}</div>'


def problem(message: str) -> str:
    """Returns an error message in a box."""
    return f'<div style="{_BOX};border-color:#c44e52;{_TEXT}">{html.escape(message)}</div>'


def footnote(line: str) -> str:
    """Returns a line in small print."""
    return f'<div style="{_DIM};font-size:85%;margin-top:.4em">{html.escape(line)}</div>'


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns chat messages in OpenAI's form, one below the other."""
    return "".join(_message(message) for message in messages)


def _message(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    calls = "".join(
        call(str(function.get("name", "")), function.get("arguments", {}))
        for function in (made.get("function", made) for made in message.get("tool_calls") or ())
    )
    content = message.get("content") or ""
    if not isinstance(content, str):  # a list of parts, as in OpenAI's API
        content = "".join(part.get("text", f"[{part.get('type')}]") for part in content)
    style = _CODE if role == "tool" else ""
    return (
        f'<div style="border-left:3px solid {_MARKS.get(role, "#888888")};padding-left:.8em;margin:.6em 0">'
        f'<div style="{_DIM};font-size:85%">{html.escape(role)}</div>'
        f"{reasoning(message.get('reasoning_content'))}{text(content, style)}{calls}</div>"
    )
