"""Builds the grammar of a whole reply from its tools and its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from .lark import HEADER
from .response_formats import ResponseFormat
from .tools import CallForm, calls_grammar, function_names, text_rule


def reply_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    form: CallForm,
    tags: tuple[int, int] | None,
    format: ResponseFormat | None,
) -> str:
    """Returns the grammar of the part of a reply after its reasoning.

    Args:
        tools: schemas of the functions, as for chat templates.
        choice: ``"auto"`` (text, calls, or text and calls), ``"required"`` (calls, possibly after a short text), or the
            name of a function that is called exactly once.
        form: the form in which the model writes calls.
        tags: ids of ``<tool_call>`` and ``</tool_call>``; may be None only if there are no tools.
        format: format of the text if the reply calls no tool.

    Raises:
        ArgumentError: a tool's schema is malformed or cannot be enforced, or no tool has the chosen name.
    """
    if not tools:
        assert format is not None, "nothing to enforce"
        return "\n".join([HEADER, "start: value", *format.rules])
    assert tags is not None, "calls need their tokens"
    named = choice not in ("auto", "required")
    if named:
        names = function_names(tools)
        if choice not in names:
            raise ArgumentError(f"tool_choice is {choice!r}, expected 'auto', 'none', 'required' or one of {names}")
        tools = [tool for tool, name in zip(tools, names, strict=True) if name == choice]
    rules, calls = calls_grammar(tools, form, tags)
    if named:
        start = "call"
    elif choice == "required":
        start = f"TEXT? {calls}"
    elif format is not None:
        start = f"{calls} | value"
    else:
        start = f"TEXT {calls}?"
    text = [text_rule(choice == "required")] if "TEXT" in start else []
    values = list(format.rules) if "value" in start and format is not None else []
    return "\n".join([HEADER, f"start: {start}", *rules, *text, *values])
