"""Tool calls as the model writes them, read back and compared with the expected ones."""

from __future__ import annotations

import json
import re
from typing import Any

CALL = re.compile(r"<tool_call>\n<function=([^>\n]+)>\n(.*?)</function>\n</tool_call>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.DOTALL)


def parse(text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls in ``text``: ``{"name", "arguments"}`` each, values typed by the function's schema.

    Raises:
        ValueError: something that looks like a call is not well formed, or a value is not of its declared type.
    """
    calls = []
    for name, body in CALL.findall(text):
        declared = _properties(name, tools)
        arguments = {key: _value(raw, declared.get(key, {})) for key, raw in PARAMETER.findall(body)}
        if PARAMETER.sub("", body).strip():
            raise ValueError(f"call of {name}: {body!r} is not a sequence of <parameter=KEY>\\nVALUE\\n</parameter>")
        calls.append({"name": name, "arguments": arguments})
    if "tool_call>" in CALL.sub("", text):
        raise ValueError(
            f"{text!r} holds a call that is not <tool_call>\\n<function=NAME>\\n...</function>\\n</tool_call>"
        )
    return calls


def right(text: str, tools: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether ``text`` makes exactly the expected calls, in order; text that cannot be parsed does not."""
    try:
        return _exact(parse(text, tools)) == _exact(expected)
    except ValueError:
        return False


def _properties(name: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool["function"]["parameters"].get("properties", {})
    return {}


def _value(raw: str, schema: dict[str, Any]) -> Any:
    return raw if schema.get("type", "string") == "string" else json.loads(raw)


def _exact(calls: list[dict[str, Any]]) -> list[str]:
    """Comparable forms in which 1, 1.0 and true differ, and the order of arguments does not matter."""
    return [json.dumps(call, sort_keys=True) for call in calls]
