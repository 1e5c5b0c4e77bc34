"""Which tool calls of the demo model are right."""

from __future__ import annotations

from demo_model import tool_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lights.set",
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}, "level": {"type": "integer"}}},
        },
    }
]
CALL = (
    "<tool_call>\n<function=lights.set>\n<parameter=room>\n{}\n</parameter>\n"
    "<parameter=level>\n{}\n</parameter>\n</function>\n</tool_call>"
)


def test_tool_calls_are_compared_by_value_and_type() -> None:
    expected = [{"name": "lights.set", "arguments": {"level": 3, "room": "12"}}]
    assert tool_calls.right(f"Sure.\n{CALL.format('12', '3')}", TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "3.0"), TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "three"), TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "3").replace("</function>\n", ""), TOOLS, expected)
    assert not tool_calls.right("The lights are on.", TOOLS, expected)
    assert tool_calls.right("The lights are on.", TOOLS, [])
