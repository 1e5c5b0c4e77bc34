"""Replies are taken apart alike whole and in pieces, wherever the pieces end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.text.reply import ReplyParser

TOOL = {
    "type": "function",
    "function": {
        "name": "store",
        "parameters": {
            "type": "object",
            "properties": {"note": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["note"],
        },
    },
}
CALL = "<tool_call>\n<function=store>\n<parameter=note>\na\n</parameter>\n</function>\n</tool_call>"
BARE = CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
JSON = '{"name": "store", "arguments": {"note": "</tool_call>", "count": "2"}}'


def parsed(pieces: list[str], tools: Any = (TOOL,), thinking: bool = False) -> dict[str, Any]:
    parser = ReplyParser(tools, thinking=thinking)
    parts = [*(parser.feed(piece) for piece in pieces), parser.feed("", last=True)]
    return {
        "reasoning": "".join(part.reasoning for part in parts),
        "text": "".join(part.text for part in parts),
        "calls": [call.arguments for part in parts for call in part.tool_calls],
        "error": any(part.error for part in parts),
        "where": parser.where,
    }


def found(text: str, **options: Any) -> tuple[Any, ...]:
    """Reasoning, text and calls, the same for the whole reply and for its single characters."""
    whole = parsed([text], **options)
    assert parsed(list(text), **options) == whole
    assert not whole["error"]
    return whole["reasoning"], whole["text"], whole["calls"]


A = [{"note": "a"}]


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("Hello.\n", False, ("", "Hello.\n", [])),
        ("hm\n</think>\n\nHello.\n", True, ("hm", "Hello.\n", [])),
        ("\n\n hm \n\n so\n</think>Hello.", True, ("hm \n\n so", "Hello.", [])),
        ("</think>\n\nHello.", True, ("", "Hello.", [])),
        ("hm", True, ("hm", "", [])),
        (f"I could {CALL} or\n", True, (f"I could {CALL} or", "", [])),
        (f"hm\n</think>\n\n{CALL}", True, ("hm", "", A)),
        ("<think>\nhm\n</think>\n\nHello.", False, ("hm", "Hello.", [])),
        ("\n<think>hm</think>Hello.", False, ("hm", "Hello.", [])),
        ("Say <think> twice.", False, ("", "Say <think> twice.", [])),
        ("a </think> b", False, ("", "a </think> b", [])),
        ("<thin", False, ("", "<thin", [])),
        (" Hello", False, ("", " Hello", [])),
        (CALL, False, ("", "", A)),
        (f"\n\n{CALL}\n", False, ("", "", A)),
        (f"Well.\n\n{CALL}\n", False, ("", "Well.", A)),
        (f"Well.\n{CALL}\n{CALL}\n\nDone.\n", False, ("", "Well.\n\n\n\nDone.\n", A + A)),
        (BARE, False, ("", "", A)),
        (f"Well.\n{BARE}\n</tool_call>\nDone.", False, ("", "Well.\n\n\nDone.", A)),
        (f"<tool_call>{JSON}</tool_call>", False, ("", "", [{"note": "</tool_call>", "count": 2}])),
        (JSON, False, ("", "", [{"note": "</tool_call>", "count": 2}])),
        (f"hm</think>\n{JSON}", True, ("hm", "", [{"note": "</tool_call>", "count": 2}])),
        ('{"name": "Bo"}', False, ("", '{"name": "Bo"}', [])),
        ("3 < 4 <tool", False, ("", "3 < 4 <tool", [])),
        ("call <function=store> and <function=x", False, ("", "call <function=store> and <function=x", [])),
    ],
)
def test_parts(text: str, thinking: bool, expected: tuple[Any, ...]) -> None:
    assert found(text, thinking=thinking) == expected


@pytest.mark.parametrize("tools", [None, (), []])
def test_without_tools_markup_of_calls_is_text(tools: Any) -> None:
    assert found(f"See {CALL}\n", tools=tools) == ("", f"See {CALL}\n", [])


@pytest.mark.parametrize(
    ("text", "thinking", "where"),
    [("hm", True, "reasoning"), ("hm</think>", True, "text"), (CALL[:-3], False, "tool_call"), (CALL, False, "text")],
)
def test_where_it_ends(text: str, thinking: bool, where: str) -> None:
    assert parsed([text], thinking=thinking)["where"] == where


def test_calls_come_when_they_end_and_text_at_once() -> None:
    parser, seen = ReplyParser([TOOL], thinking=True), []
    for piece in ["hm", " so", "</think>", "\n\nHi", " you <", "b>", "\n", CALL[:-1], ">", "x"]:
        parts = parser.feed(piece)
        seen.append((parts.reasoning, parts.text, len(parts.tool_calls)))
    assert seen == [
        ("hm", "", 0), (" so", "", 0), ("", "", 0), ("", "Hi", 0), ("", " you", 0), ("", " <b>", 0), ("", "", 0), ("", "", 0),
        ("", "", 1), ("", "\nx", 0),
    ]  # fmt: skip


def test_white_space_before_what_may_be_a_call_is_held_back() -> None:
    text = "ok\n\n" + BARE
    assert parsed(["ok\n\n<", text[5:]], tools=[TOOL]) == parsed([text], tools=[TOOL])


@pytest.mark.parametrize("prefill", ["", "a", "a ", " ", "<", "a <", "<fun", "a\n<tool_", '{"na'])
@pytest.mark.parametrize("rest", ["b", " b <c", "ction> b"])
def test_a_prefill_is_not_said_again(prefill: str, rest: str) -> None:
    parser = ReplyParser([TOOL])
    parser.begin(prefill)
    assert parser.feed(rest).text + parser.feed("", last=True).text == rest


def test_after_a_malformed_call_the_next_one_is_read() -> None:
    whole = parsed([f"a {CALL.replace('store', 'other')} b {CALL}"])
    assert (whole["text"], whole["calls"], whole["error"]) == ("a  b", A, True)


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=store>", "<function=", "</function>", "<parameter=note>",
    "</parameter>", "\n", " ", "a", "<", '{"name": "store", "arguments": {', '"note": "x"}}', '"', "}", CALL, BARE, JSON,
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=10), st.booleans(), st.booleans(), st.data())
def test_the_outcome_does_not_depend_on_the_pieces(
    soup: list[str], thinking: bool, tools: bool, data: st.DataObject
) -> None:
    text = "".join(soup)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"thinking": thinking, "tools": [TOOL] if tools else None}
    assert parsed(pieces, **options) == parsed([text], **options) == parsed(list(text), **options)
