"""Checks the messages of a turn against the earlier messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..checks import shown
from ..errors import PromptError
from ..notebook import html

Content: TypeAlias = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""The text of a user's message, a message, or several messages."""


def to_send(content: Content, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the content of a turn as a list of messages.

    Args:
        messages: the earlier messages.

    Raises:
        PromptError: there is nothing to answer, or calls of the last reply have no results yet.
    """
    if isinstance(content, str):
        content = {"role": "user", "content": content}
    listed = [content] if isinstance(content, Mapping) else content
    if not isinstance(listed, Sequence) or not all(isinstance(message, Mapping) for message in listed):
        raise PromptError(f"found {shown(content)}, expected a text, a message or a list of messages")
    given = [dict(message) for message in listed]
    if not given and (not messages or messages[-1].get("role") == "assistant"):
        raise PromptError("there is nothing to answer; send a text or a message")
    answered = {message.get("tool_call_id") for message in given if message.get("role") == "tool"}
    if missing := [call["function"]["name"] for call in unanswered(messages) if call.get("id") not in answered]:
        raise PromptError(
            f"the calls of {missing} have no results yet; send them as "
            '{"role": "tool", "tool_call_id": ..., "content": ...}, or undo() the turn'
        )
    return given


def unanswered(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the calls of the last reply that have no results yet."""
    answered: set[Any] = set()
    for message in reversed(messages):
        if message.get("role") != "tool":
            return [call for call in message.get("tool_calls") or [] if call.get("id") not in answered]
        answered.add(message.get("tool_call_id"))
    return []


class ShownMessages:
    """A display of messages: one line in a terminal, and all of them in a notebook."""

    messages: list[dict[str, Any]]

    def __repr__(self) -> str:
        count = len(self.messages)
        last = f", the last of the {self.messages[-1].get('role')}" if count else ""
        return f"{type(self).__name__}({count} message{'s' if count != 1 else ''}{last})"

    def _repr_html_(self) -> str:
        return html.conversation(self.messages) or html.footnote(repr(self))
