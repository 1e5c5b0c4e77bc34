"""Scores tool calls: the share with the right functions and the right arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import ArgumentError, PromptError, TokenizerError, ToolCallError
from ..text.tool_calls import parse_tool_calls
from .estimates import Estimate, proportion
from .json_lines import Line, read_lines


@dataclass(frozen=True)
class ToolCallCase:
    """A conversation that ends before a reply of the assistant, and the expected calls of that reply.

    Attributes:
        calls: the expected calls, each ``{"name": ..., "arguments": {...}}``; empty if no tool should be called.
        enable_thinking: value for the chat template; None leaves it unset.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    calls: list[dict[str, Any]]
    enable_thinking: bool | None = None


class Reply(Protocol):
    """The interface of a reply that can be scored, such as :class:`~flash_moe.Generation`."""

    @property
    def raw_text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...


@dataclass(frozen=True)
class ToolCallScore:
    """The results as shares of all cases, with binomial standard errors.

    Attributes:
        parsed: share of replies in which every call is well formed, including replies without calls.
        right_functions: share of replies that also call exactly the expected functions, in any order.
        right: share of replies whose arguments are equal too.
        cut: number of replies that ended at the token limit.
    """

    cases: int
    parsed: Estimate
    right_functions: Estimate
    right: Estimate
    cut: int

    def __str__(self) -> str:
        return (
            f"{self.cases:,} cases: parsed {self.parsed}, right functions {self.right_functions}, "
            f"entirely right {self.right}; {self.cut:,} cut"
        )


def read_tool_call_cases(path: str | os.PathLike[str], limit: int | None = None) -> list[ToolCallCase]:
    """Reads the first ``limit`` lines ``{"messages": [...], "tools": [...], "calls": [...]}`` of a file.

    Raises:
        ArgumentError: the file is malformed or empty.
        OSError: the file cannot be read.
    """
    file = Path(path)
    cases = [
        ToolCallCase(line.messages(), line.objects("tools"), _calls(line), line.flag("enable_thinking"))
        for line in read_lines(file, limit)
    ]
    if not cases:
        raise ArgumentError(f'{file} is empty; expected lines {{"messages": [...], "tools": [...], "calls": [...]}}')
    return cases


def _calls(line: Line) -> list[dict[str, Any]]:
    calls = line.objects("calls")
    if calls is None or not all(isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict) for c in calls):
        raise line.error("calls", 'a list of {"name": string, "arguments": object}, empty for no call')
    return calls


def tool_call_score(
    cases: Sequence[ToolCallCase],
    generate: Callable[[ToolCallCase], Reply],
    progress: Callable[[int, int], None] | None = None,
) -> ToolCallScore:
    """Generates a reply to every case and compares its calls with the expected ones.

    Args:
        generate: function that returns the reply to a case, e.g. :func:`~flash_moe.evaluation.greedy` of a model.
        progress: function that is called as ``progress(done, total)`` after each case.

    Raises:
        ArgumentError: there are no cases.
        PromptError, TokenizerError: a case is too long, or does not fit the chat template.
    """
    if not cases:
        raise ArgumentError("there are no cases to score; pass at least one")
    parsed = functions = right = cut = 0
    for number, case in enumerate(cases, start=1):
        try:
            reply = generate(case)
        except (PromptError, TokenizerError) as error:
            raise type(error)(f"tool-call case {number}: {error}") from error
        cut += reply.finish_reason == "length"
        try:
            calls, _ = parse_tool_calls(reply.raw_text, case.tools)
        except ToolCallError:
            calls = None  # counts as not parsed
        if calls is not None:
            parsed += 1
            functions += sorted(c["name"] for c in calls) == sorted(c["name"] for c in case.calls)
            right += same_calls(calls, case.calls)
        if progress is not None:
            progress(number, len(cases))
    n = len(cases)
    return ToolCallScore(n, proportion(parsed, n), proportion(functions, n), proportion(right, n), cut)


def same_calls(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> bool:
    """Returns whether two lists contain equal calls, in any order."""
    rest = list(expected)
    for call in found:
        match = next((i for i, other in enumerate(rest) if _equal(call, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _equal(a: Any, b: Any) -> bool:
    """Returns whether two JSON values are equal: 1 equals 1.0, but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)
