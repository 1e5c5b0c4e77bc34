"""Parses the tool calls of a complete reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ToolCallError
from .call_reader import ToolCall
from .reply import THINK_END, ReplyParser


def parse_tool_calls(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool | None = None,
    finish_reason: str | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Parses the tool calls of a reply, and returns them in order with the text around them.

    Calls inside the reasoning are not parsed; reasoning is part of the text.

    Args:
        text: the generated text.
        tools: JSON schemas of the functions, as passed to the chat template. Values are converted to the types of their
            schemas. Calls that do not fit the schemas are errors. Without schemas, every call is accepted as written.
        thinking: whether the prompt ended inside reasoning. With None, all text before a ``</think>`` counts as
            reasoning, unless the calls are well-formed only without this assumption.
        finish_reason: reason why the generation ended; used in the error of a call that was cut.

    Returns:
        The calls, each ``{"name": str, "arguments": dict}`` as in ``tool_calls`` of a message, and the rest of the text
            without white space at its ends. The list is empty if there are no calls.

    Raises:
        ToolCallError: a call is cut or malformed, names an undeclared function or parameter, or has a value of the
            wrong type. ``calls`` of the error holds the well-formed calls.
    """
    guessed = thinking is None
    if thinking is None:
        thinking = THINK_END in text
    calls, rest, error = _read(text, tools, thinking)
    if error is not None and guessed and thinking:
        other = _read(text, tools, False)
        if other[2] is None:
            calls, rest, error = other
    if error is not None:
        note = "; max_tokens was reached" if finish_reason == "length" else ""
        raise ToolCallError(f"{error}{note}", tuple(_plain(call) for call in calls))
    return [_plain(call) for call in calls], rest


def _read(
    text: str, tools: Sequence[Mapping[str, Any]] | None, thinking: bool
) -> tuple[list[ToolCall], str, ToolCallError | None]:
    """Returns the calls, the rest of the text with its reasoning, and the error, if any."""
    position = 0
    if thinking:
        position = text.index(THINK_END) + len(THINK_END) if THINK_END in text else len(text)
    parser = ReplyParser(tools, calls=True)
    parts = parser.feed(text[position:], last=True)
    return parts.tool_calls, (text[:position] + parts.reasoning + parts.text).strip(), parts.error


def _plain(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}
