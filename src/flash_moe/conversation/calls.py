"""Runs the functions that a model calls."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Thread
from typing import Any

from ..generation.result import ToolResult
from ..text.call_reader import ToolCall
from ..text.function_tools import FunctionTool, Tool, failure, function_tool, tool_schemas

_LOOK_SECONDS = 0.05


class Tools:
    """The tools of a conversation.

    Args:
        tools: functions, which are run, and JSON schemas, whose calls the caller answers.
        max_rounds: the maximum number of rounds of calls in a turn.
        confirm: function that decides before each call whether it may run.

    Attributes:
        schemas: the schemas of all tools; None if there are no tools.
    """

    def __init__(self, tools: Sequence[Tool], max_rounds: int, confirm: Callable[[ToolCall], bool] | None) -> None:
        self.schemas = tool_schemas(tools) or None
        runnable = [function_tool(tool) for tool in tools if not isinstance(tool, Mapping)]
        self._functions = {tool.name: tool for tool in runnable}
        self._max_rounds, self._confirm = max_rounds, confirm

    def runs(self, call: ToolCall) -> bool:
        """Returns whether the call names a function, not only a schema."""
        return call.name in self._functions

    def result(self, call: ToolCall, last: bool, cancel: Any) -> ToolResult:
        """Runs the call of a function, if it is allowed, and returns the result.

        Args:
            last: whether the limit of rounds is reached; then the function does not run.
        """
        if last:
            return ToolResult(call, failure(f"not run: {self._max_rounds} rounds of calls are the limit"), failed=True)
        if cancel is not None and cancel.is_set():
            return ToolResult(call, failure("the turn was cancelled"), failed=True)
        if self._confirm is not None and not self._confirm(call):
            return ToolResult(call, failure("the user declined this call"), failed=True)
        if cancel is not None and cancel.is_set():  # while the user was asked
            return ToolResult(call, failure("the turn was cancelled"), failed=True)
        return run_call(self._functions[call.name], call, cancel)


def run_call(function: FunctionTool, call: ToolCall, cancel: Any) -> ToolResult:
    """Calls a function and returns the result. An error of the function, or a return value that JSON cannot represent,
    is a failed result.

    Args:
        cancel: None runs the function in this thread. With an event, the function runs in a separate thread, so that
            the wait for it can be cancelled.
    """
    if cancel is None:
        return _called(function, call)
    results: list[ToolResult | BaseException] = []
    done, context = Event(), contextvars.copy_context()

    def work() -> None:
        try:
            results.append(context.run(_called, function, call))
        except BaseException as error:  # such as SystemExit: raised in the thread of the turn
            results.append(error)
        done.set()

    Thread(target=work, name="flash_moe tool", daemon=True).start()
    while not done.wait(_LOOK_SECONDS):
        if cancel.is_set():
            return ToolResult(call, failure("the turn was cancelled while the function ran"), failed=True)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _called(function: FunctionTool, call: ToolCall) -> ToolResult:
    try:
        return ToolResult(call, function.call(call.arguments), failed=False)
    except Exception as error:
        return ToolResult(call, failure(error), failed=True)
