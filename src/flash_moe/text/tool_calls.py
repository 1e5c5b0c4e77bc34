"""Tool calls in a reply's text, in the two forms that Qwen's chat templates teach.

Qwen3.5 and Qwen3-Coder write parameters as text:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Qwen3-Next writes JSON: ``<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ToolCallError
from .tool_schemas import from_text, parameter_types

_OPEN, _CLOSE, _THOUGHT = "<tool_call>", "</tool_call>", "</think>"
_NAME = re.compile(r"([^<>\n]+)>")
# A value may itself hold </parameter>: the one that ends it is followed by what can follow a parameter.
_VALUE_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))")


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[list[dict[str, Any]], str]:
    """The tool calls of a reply, in order, and the text around them.

    Reasoning that ends with ``</think>`` is text, whatever it holds.

    Args:
        text: what the model generated.
        tools: the functions' JSON schemas that the chat template was given. A value written as text becomes what its
            schema's types say; it stays a string if the schema allows only that or does not mention it.

    Returns:
        Calls ``{"name": str, "arguments": dict}``, as a message's ``tool_calls`` may hold them, and the rest of the
        text without white space at its ends. No call at all is fine.

    Raises:
        ToolCallError: a call is cut or malformed, or a value is not of its declared type.
    """
    types = parameter_types(tools or ())
    calls: list[dict[str, Any]] = []
    position = text.index(_THOUGHT) + len(_THOUGHT) if _THOUGHT in text else 0
    rest = [text[:position]]
    while (opening := text.find(_OPEN, position)) >= 0:
        rest.append(_outside(text[position:opening]))
        scanner = _Scanner(text, opening + len(_OPEN))
        calls.append(_json_call(scanner) if scanner.sees("{") else _text_call(scanner, types))
        scanner.expect(_CLOSE)
        position = scanner.position
    rest.append(_outside(text[position:]))
    return calls, "".join(rest).strip()


def _outside(text: str) -> str:
    if _CLOSE in text:
        raise ToolCallError(f"found {_CLOSE} without {_OPEN}; generate the reply again")
    return text


def _text_call(scanner: _Scanner, types: Mapping[str, Mapping[str, frozenset[str]]]) -> dict[str, Any]:
    name = scanner.tag("<function=")
    arguments: dict[str, Any] = {}
    while not scanner.sees("</function>"):
        key = scanner.tag("<parameter=")
        if key in arguments:
            raise ToolCallError(f"parameter {key!r} of {name} is given twice, expected once; generate the reply again")
        value = scanner.value().removeprefix("\n").removesuffix("\n")
        arguments[key] = from_text(value, types.get(name, {}).get(key, frozenset()), f"parameter {key!r} of {name}")
    scanner.expect("</function>")
    return {"name": name, "arguments": arguments}


def _json_call(scanner: _Scanner) -> dict[str, Any]:
    call = scanner.json()
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ToolCallError(
            f'a tool call is {json.dumps(call):.200}, expected {{"name": string, "arguments": object}}; '
            "generate the reply again"
        )
    return {"name": name, "arguments": arguments}


class _Scanner:
    """Reads a text from left to right, white space between its parts aside."""

    def __init__(self, text: str, position: int) -> None:
        self._text, self.position = text, position

    def sees(self, literal: str) -> bool:
        """Whether ``literal`` comes next."""
        while self.position < len(self._text) and self._text[self.position].isspace():
            self.position += 1
        return self._text.startswith(literal, self.position)

    def expect(self, literal: str) -> None:
        """Passes over ``literal``."""
        if not self.sees(literal):
            raise self._error(literal)
        self.position += len(literal)

    def tag(self, opening: str) -> str:
        """The name in ``<function=NAME>``."""
        self.expect(opening)
        if (match := _NAME.match(self._text, self.position)) is None:
            raise self._error(f"{opening}NAME>")
        self.position = match.end()
        return match[1].strip()

    def value(self) -> str:
        """The text up to the end of a parameter."""
        if (match := _VALUE_END.search(self._text, self.position)) is None:
            raise self._error("a value and </parameter>")
        start, self.position = self.position, match.end()
        return self._text[start : match.start()]

    def json(self) -> dict[str, Any]:
        """A JSON object."""
        try:
            value, self.position = json.JSONDecoder().raw_decode(self._text, self.position)
        except (ValueError, RecursionError) as error:
            raise ToolCallError(f"a tool call is no JSON object ({error}); generate the reply again") from error
        return value

    def _error(self, expected: str) -> ToolCallError:
        found = self._text[self.position : self.position + 40]
        what = repr(found) if found else "the end of the text"
        return ToolCallError(
            f"found {what} at character {self.position} of the reply, expected {expected}; generate the reply again, "
            "with more tokens if it was cut"
        )
