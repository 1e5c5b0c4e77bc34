"""The tool calls of a whole reply."""

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
    """Returns the tool calls of a reply, in order, and the text around them.

    Reasoning is text, whatever it holds.

    Args:
        text: what the model generated.
        tools: the functions' JSON schemas that the chat template was given. Values become what their schemas say.
            Calls that the schemas do not allow are errors. Without schemas every call is taken as it is written.
        thinking: whether the prompt ended inside reasoning; None takes all before a ``</think>`` for reasoning, unless
            only the other reading gives well-formed calls.
        finish_reason: why the generation ended, for the error of a call that was cut.

    Returns:
        Calls ``{"name": str, "arguments": dict}``, as a message's ``tool_calls`` may hold them, and the rest of the
        text without white space at its ends. No call at all is fine.

    Raises:
        ToolCallError: a call is cut, malformed, or of a function or with a parameter that was not offered, or a value
            is not of its declared type. The error's ``calls`` are the well-formed ones.
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
    """Returns the calls, the rest with its reasoning, and what is wrong."""
    position = 0
    if thinking:
        position = text.index(THINK_END) + len(THINK_END) if THINK_END in text else len(text)
    parser = ReplyParser(tools, calls=True)
    parts = parser.feed(text[position:], last=True)
    return parts.tool_calls, (text[:position] + parts.reasoning + parts.text).strip(), parts.error


def _plain(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}
