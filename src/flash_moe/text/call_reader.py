"""Parses tool calls in the two forms of Qwen's chat templates.

Qwen3.5 and Qwen3-Coder write parameters as text:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Qwen3-Next writes JSON: ``<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>``.

A call must fit the schemas, or it is rejected. In particular, a parameter without an end tag must not absorb the next
parameter.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ToolCallError
from .tool_schemas import Function, finite, functions, loads

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"([^<>\n]+)>")
_MARK = re.compile(r"<parameter=([^<>\n]+)>|</parameter>|<function=[^<>\n]+>|</function>|<tool_call>|</tool_call>")
_AFTER_FUNCTION = re.compile(r"\s*(?:</tool_call>|<function=)")


@dataclass(frozen=True)
class ToolCall:
    """A function call that a model requests.

    Attributes:
        id: identifier of the call, which its result repeats.
        name: name of the function.
        arguments: values of the parameters, by name.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    @classmethod
    def new(cls, name: str, arguments: dict[str, Any]) -> ToolCall:
        """Returns a call with a new id."""
        return cls(f"call_{secrets.token_hex(12)}", name, arguments)

    def to_message(self) -> dict[str, Any]:
        """Returns the call in OpenAI's form for ``tool_calls`` of a message, with the arguments as a JSON string."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class CallReader:
    """Parses the calls of one reply.

    Args:
        tools: JSON schemas of the functions; without schemas, every call is accepted as written.
    """

    def __init__(self, tools: Any) -> None:
        self.functions = functions(tools)

    def wrapped(self, text: str, calls: list[ToolCall]) -> bool:
        """Parses the text after ``<tool_call>``; ``text`` ends with a ``</tool_call>``.

        Args:
            calls: list to which the calls are appended, including those before a malformed call.

        Returns:
            Whether the calls end here. If not, this ``</tool_call>`` may be part of a value.

        Raises:
            ToolCallError: a call is malformed, and no further text can correct it.
        """
        scanner, found = _Scanner(text), len(calls)
        while not scanner.sees(CLOSE) or len(calls) == found:
            try:
                if scanner.sees("{") or scanner.sees("["):
                    calls += [self.from_json(value) for value in scanner.json()]
                else:
                    calls.append(self._text_call(scanner, wrapped=True))
            except _Unfinished:
                return False
        return True

    def bare(self, text: str, calls: list[ToolCall]) -> bool:
        """Parses ``<function=...`` without ``<tool_call>``, up to a ``</function>`` that ends ``text``.

        Arguments and result are those of :meth:`wrapped`.
        """
        try:
            calls.append(self._text_call(_Scanner(text), wrapped=False))
        except _Unfinished:
            return False
        return True

    def from_json(self, value: Any) -> ToolCall:
        """Returns the call for ``{"name": ..., "arguments": ...}``; the arguments may be a JSON string."""
        call = value if isinstance(value, Mapping) else {}
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = loads(arguments)
            except ValueError:
                name = None
        if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
            raise ToolCallError(
                f'a tool call is {value!r:.200}, expected {{"name": string, "arguments": object}}; '
                "generate the reply again"
            )
        function = self._function(name)
        given = arguments or {}
        if function is not None:
            given = {key: function.argument(key, item, written=False) for key, item in given.items()}
            function.require(given)
        return ToolCall.new(name, dict(given))

    def _text_call(self, scanner: _Scanner, wrapped: bool) -> ToolCall:
        name = scanner.tag(FUNCTION)
        function = self._function(name)
        arguments: dict[str, Any] = {}
        while not scanner.sees(FUNCTION_END):
            key = scanner.tag(_PARAMETER)
            if key in arguments:
                raise ToolCallError(
                    f"parameter {key!r} of {name} is given twice, expected once; generate the reply again"
                )
            value = scanner.value(function, {*arguments, key}, wrapped)
            arguments[key] = value if function is None else function.argument(key, value, written=True)
        scanner.expect(FUNCTION_END)
        if function is not None:
            function.require(arguments)
        return ToolCall.new(name, arguments)

    def _function(self, name: str) -> Function | None:
        if not self.functions:
            return None
        if name not in self.functions:
            raise ToolCallError(
                f"the reply calls {name!r}, expected one of the functions {list(self.functions)}; "
                "generate the reply again"
            )
        return self.functions[name]


class _Unfinished(Exception):
    """The text ends before the current element is complete."""


class _Scanner:
    """Scans a text from left to right, and skips white space between its parts."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0

    def sees(self, literal: str) -> bool:
        """Returns whether ``literal`` is next in the text."""
        while self._position < len(self._text) and self._text[self._position].isspace():
            self._position += 1
        return self._text.startswith(literal, self._position)

    def expect(self, literal: str) -> None:
        """Skips ``literal``, which must be next in the text."""
        if not self.sees(literal):
            raise self._error(literal)
        self._position += len(literal)

    def tag(self, opening: str) -> str:
        """Reads ``<function=NAME>`` or ``<parameter=NAME>`` and returns the name."""
        self.expect(opening)
        if (match := _NAME.match(self._text, self._position)) is None:
            raise self._error(f"{opening}NAME>")
        self._position = match.end()
        return match[1].strip()

    def value(self, function: Function | None, given: set[str], wrapped: bool) -> str:
        """Reads the value of a parameter and its end tag, and returns the value.

        A value may itself contain tool calls. So its end is a ``</parameter>`` that matches no ``<parameter=`` inside
        the value, and whose following text can follow a parameter.

        Args:
            function: function of the parameter; None if it is unknown.
            given: parameters of the call so far, including this one.

        Raises:
            ToolCallError: the end tag is missing, because the value contains the next parameter or the end of the call.
        """
        start, unknown = self._position, ""
        wrappers = calls = parameters = 0  # opened inside the value
        for mark in _MARK.finditer(self._text, start):
            if mark[0] == _PARAMETER_END:
                if not parameters and self._ends(mark.end(), function, wrapped):
                    self._position = mark.end()
                    return _inner(self._text[start : mark.start()])
                parameters = max(0, parameters - 1)
            elif mark[0] == FUNCTION_END:
                calls = max(0, calls - 1)
            elif mark[0] == OPEN:
                wrappers += 1
            elif mark[0] == CLOSE:
                if wrapped and not wrappers:
                    raise self._error(f"a value and {_PARAMETER_END}", unknown)
                wrappers = max(0, wrappers - 1)
            elif mark[1] is None:
                calls += 1
            else:
                key = mark[1].strip()
                if not calls and function is not None and key in function.types and key not in given:
                    raise self._error(f"a value and {_PARAMETER_END} before the parameter {key!r}")
                unknown = unknown or key
                parameters += 1
        raise _Unfinished

    def _ends(self, position: int, function: Function | None, wrapped: bool) -> bool:
        """Returns whether the text at ``position`` can follow a parameter."""
        position = _skip(self._text, position)
        if self._text.startswith(FUNCTION_END, position):
            return not wrapped or bool(_AFTER_FUNCTION.match(self._text, position + len(FUNCTION_END)))
        if self._text.startswith(_PARAMETER, position):
            name = _NAME.match(self._text, position + len(_PARAMETER))
            return name is not None and (function is None or function.takes(name[1].strip()))
        if wrapped and self._text.startswith(CLOSE, position):
            self._position = position
            raise self._error(FUNCTION_END)
        return False

    def json(self) -> list[Any]:
        """Reads a JSON value, or a Python literal up to the end. Returns the elements of a list, or one value."""
        decoder = json.JSONDecoder(strict=False, parse_constant=finite, parse_float=finite)
        try:
            value, self._position = decoder.raw_decode(self._text, self._position)
        except (ValueError, RecursionError) as error:
            if "Unterminated string" in str(error):
                raise _Unfinished from None
            try:
                value = loads(self._text[self._position :].removesuffix(CLOSE))
            except ValueError:
                raise ToolCallError(f"a tool call is no JSON object ({error}); generate the reply again") from error
            self._position = len(self._text) - len(CLOSE)
        return value if isinstance(value, list) else [value]

    def _error(self, expected: str, unknown: str = "") -> ToolCallError:
        found = self._text[self._position : self._position + 40]
        what = repr(found) if found else "the end of the text"
        note = f" (it holds the parameter {unknown!r}, which the function does not declare)" if unknown else ""
        return ToolCallError(f"found {what} in a tool call, expected {expected}{note}; generate the reply again")


def _skip(text: str, position: int) -> int:
    """Returns the position of the next character that is not white space."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _inner(value: str) -> str:
    """Returns a value without the line breaks between it and its tags."""
    if value.startswith("\r\n"):
        return value[2:].removesuffix("\n").removesuffix("\r")
    return value.removeprefix("\n").removesuffix("\n")
