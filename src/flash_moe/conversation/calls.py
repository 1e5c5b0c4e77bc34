"""Runs a function that a model calls."""

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
        tools: functions, which are run, and JSON schemas.
        max_rounds: the most rounds of calls in a turn.
        confirm: asked before each call.

    Attributes:
        schemas: of all tools; None without any.
    """

    def __init__(self, tools: Sequence[Tool], max_rounds: int, confirm: Callable[[ToolCall], bool] | None) -> None:
        self.schemas = tool_schemas(tools) or None
        runnable = [function_tool(tool) for tool in tools if not isinstance(tool, Mapping)]
        self._functions = {tool.name: tool for tool in runnable}
        self._max_rounds, self._confirm = max_rounds, confirm

    def runs(self, call: ToolCall) -> bool:
        """Returns whether the call is of a function, not of a schema."""
        return call.name in self._functions

    def result(self, call: ToolCall, last: bool, cancel: Any) -> ToolResult:
        """Returns what comes of the call of a function.

        Args:
            last: the model may not call any more; nothing is run.
        """
        if last:
            return ToolResult(call, failure(f"not run: {self._max_rounds} rounds of calls are the limit"), failed=True)
        if cancel is not None and cancel.is_set():
            return ToolResult(call, failure("the turn was cancelled"), failed=True)
        if self._confirm is not None and not self._confirm(call):
            return ToolResult(call, failure("the user declined this call"), failed=True)
        return run_call(self._functions[call.name], call, cancel)


def run_call(function: FunctionTool, call: ToolCall, cancel: Any) -> ToolResult:
    """Returns the result of a call. What the function raises, or returns and JSON cannot hold, is a result as well.

    Args:
        cancel: None runs the function in this thread. With an event it runs in a thread of its own, so that waiting for
            it can end.
    """
    if cancel is None:
        return _called(function, call)
    results: list[ToolResult | BaseException] = []
    done, context = Event(), contextvars.copy_context()

    def work() -> None:
        try:
            results.append(context.run(_called, function, call))
        except BaseException as error:  # such as SystemExit: raised where the turn runs
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
