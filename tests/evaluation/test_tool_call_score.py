"""Replies are judged by their calls: well-formed, the right functions, the right arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flash_moe import ArgumentError, PromptError, TokenizerError
from flash_moe.evaluation import ToolCallCase, tool_call_score

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "on": {"type": "boolean"}, "at": {}}
            },
        },
    }
    for name in ("weather", "light")
]  # fmt: skip
WEATHER = {"name": "weather", "arguments": {"city": "Köln", "days": 1}}
LIGHT = {"name": "light", "arguments": {"on": True}}
NESTED = {"name": "light", "arguments": {"at": [{"x": [1, None]}]}}


def case(*calls: dict[str, Any]) -> ToolCallCase:
    return ToolCallCase([{"role": "user", "content": "?"}], TOOLS, list(calls))


def reply(*calls: dict[str, Any]) -> str:
    text = "Let me see.</think>"
    for call in calls:
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in call["arguments"].items()}
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        text += f"<tool_call>\n<function={call['name']}>\n{parameters}</function>\n</tool_call>\n"
    return text


def always(text: str, finish_reason: str = "stop") -> Callable[[ToolCallCase], Any]:
    return lambda case: SimpleNamespace(raw_text=text, finish_reason=finish_reason)


def changed(call: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"] | arguments}


@pytest.mark.parametrize(
    ("expected", "text", "judgement"),
    [
        ([WEATHER], reply(WEATHER), (1, 1, 1)),
        ([WEATHER], f"<tool_call>\n{json.dumps(WEATHER)}\n</tool_call>", (1, 1, 1)),
        ([WEATHER], reply(changed(WEATHER, days=2)), (1, 1, 0)),
        ([WEATHER], reply(changed(WEATHER, city="köln")), (1, 1, 0)),
        ([WEATHER], reply(changed(WEATHER, on=False)), (1, 1, 0)),
        ([WEATHER], reply({"name": "weather", "arguments": {"city": "Köln"}}), (1, 1, 0)),
        ([WEATHER], reply(changed(LIGHT)), (1, 0, 0)),
        ([WEATHER], reply(WEATHER, WEATHER), (1, 0, 0)),
        ([WEATHER], "Sunny.", (1, 0, 0)),
        ([WEATHER], reply(WEATHER).removesuffix("</tool_call>\n"), (0, 0, 0)),
        ([WEATHER], reply(changed(WEATHER, days="soon")), (0, 0, 0)),
        ([WEATHER, LIGHT], reply(LIGHT, WEATHER), (1, 1, 1)),
        ([WEATHER, WEATHER], reply(WEATHER, changed(WEATHER, days=2)), (1, 1, 0)),
        ([WEATHER, changed(WEATHER, days=2)], reply(changed(WEATHER, days=2), WEATHER), (1, 1, 1)),
        ([], "It is on.", (1, 1, 1)),
        ([], reply(LIGHT), (1, 0, 0)),
        ([], "<tool_call>", (0, 0, 0)),
        ([{"name": "light", "arguments": {"on": 1}}], reply(LIGHT), (1, 1, 0)),
        ([changed(WEATHER, days=1.0)], reply(WEATHER), (1, 1, 1)),
        ([NESTED], f"<tool_call>{json.dumps(NESTED)}</tool_call>", (1, 1, 1)),
        ([NESTED], f"<tool_call>{json.dumps(changed(NESTED, at=[{'x': [1]}]))}</tool_call>", (1, 1, 0)),
    ],
)  # fmt: skip
def test_judgement(expected: list[dict[str, Any]], text: str, judgement: tuple[int, int, int]) -> None:
    found = tool_call_score([case(*expected)], always(text))
    assert (found.parsed.value, found.right_functions.value, found.right.value) == judgement


def test_shares_and_errors() -> None:
    replies = [reply(WEATHER), reply(changed(WEATHER, days=7)), reply(LIGHT), "<tool_call>", "Sunny."]
    cases = [case(WEATHER) for _ in replies]
    reasons = ["stop", "stop", "stop", "length", "stop"]
    remaining = (SimpleNamespace(raw_text=text, finish_reason=why) for text, why in zip(replies, reasons, strict=True))
    progress: list[tuple[int, int]] = []
    found = tool_call_score(cases, lambda _: next(remaining), lambda *done: progress.append(done))
    assert (found.cases, found.cut) == (5, 1)
    assert [found.parsed.value, found.right_functions.value, found.right.value] == [0.8, 0.4, 0.2]
    assert found.right.standard_error == pytest.approx(math.sqrt(0.2 * 0.8 / 5))
    assert progress == [(done, 5) for done in range(1, 6)]
    assert str(found) == "5 cases: parsed 0.80 ± 0.18, right functions 0.40 ± 0.22, entirely right 0.20 ± 0.18; 1 cut"


def test_no_cases() -> None:
    with pytest.raises(ArgumentError, match="no cases"):
        tool_call_score([], always(""))


@pytest.mark.parametrize("error", [PromptError, TokenizerError])
def test_a_case_that_cannot_be_asked_is_named(error: type[Exception]) -> None:
    def generate(_: ToolCallCase) -> Any:
        raise error("too long")

    with pytest.raises(error, match="tool-call case 1: too long"):
        tool_call_score([case()], generate)
