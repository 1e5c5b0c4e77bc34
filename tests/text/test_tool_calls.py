"""Tool calls are read back as chat templates write them; what is malformed is an error, never a wrong call."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flash_moe.errors import FlashMoEError, ToolCallError
from flash_moe.text.tool_calls import parse_tool_calls


def tool(name: str, root: dict[str, Any] | None = None, /, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **(root or {})}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def written(name: str, /, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


WEATHER = tool(
    "weather",
    city={"type": "string"},
    days={"type": "integer"},
    limit={"type": "number"},
    metric={"type": "boolean"},
    tags={"type": "array"},
    where={"type": "object"},
    note={"type": ["string", "null"]},
    until={"anyOf": [{"type": "integer"}, {"type": "null"}]},
    unit={"enum": [1, 2]},
    anything={},
)


def arguments(**values: str) -> dict[str, Any]:
    calls, rest = parse_tool_calls(written("weather", **values), [WEATHER])
    assert rest == ""
    ((name, found),) = [(call["name"], call["arguments"]) for call in calls]
    assert name == "weather"
    return found


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "Köln", "Köln"),
        ("city", "12", "12"),
        ("city", "", ""),
        ("city", "\r\nx\r", "\r\nx\r"),
        ("city", "\n two\n\nlines \n", "\n two\n\nlines \n"),
        ("city", "a </parameter> b <tool_call> </function>", "a </parameter> b <tool_call> </function>"),
        ("days", "3", 3),
        ("days", "3.0", 3),
        ("days", " -7 ", -7),
        ("limit", "3", 3),
        ("limit", "0.5", 0.5),
        ("metric", "true", True),
        ("metric", "False", False),
        ("metric", "TRUE", True),
        ("until", "NULL", None),
        ("note", "none", "none"),
        ("where", '{"x": "a\nb"}', {"x": "a\nb"}),
        ("where", "{'x': True, 'y': None, 'z': (1, 2)}", {"x": True, "y": None, "z": [1, 2]}),
        ("tags", "['a', 'b']", ["a", "b"]),
        ("city", "</think>", "</think>"),
        (
            "city",
            "<tool_call>\n<function=f>\n</function>\n</tool_call>",
            "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        ),
        ("city", written("f", x="1"), written("f", x="1")),
        ("city", written("weather", days="1"), written("weather", days="1")),
        (
            "city",
            "1\n</parameter>\n<parameter=zzz>\n2\n</parameter>\n3",
            "1\n</parameter>\n<parameter=zzz>\n2\n</parameter>\n3",
        ),
        ("tags", '["a", 1, null]', ["a", 1, None]),
        ("where", '{"x": {"y": [1]}}', {"x": {"y": [1]}}),
        ("note", "null", None),
        ("note", "12", "12"),
        ("until", "None", None),
        ("until", "12", 12),
        ("unit", "2", 2),
        ("anything", "12", "12"),
    ],
)
def test_values_have_their_declared_types(key: str, text: str, value: object) -> None:
    found = arguments(**{key: text})
    assert found == {key: value}
    windows = written("weather", **{key: text}).replace("\n", "\r\n")
    if "\n" not in text:
        assert parse_tool_calls(windows, [WEATHER])[0][0]["arguments"] == found
    assert type(found[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("days", "three"), ("days", "3.5"), ("days", "true"), ("days", ""), ("days", "9" * 5000), ("limit", "NaN"),
        ("limit", "1e999"), ("metric", "1"), ("metric", "yes"), ("tags", "a, b"), ("tags", "{1, 2}"),
        ("where", '{"x": NaN}'), ("where", '{"x": 1e999}'), ("where", "{1: 2}"), ("where", "{'x': 1j}"), ("tags", "[" * 100_000),
        ("where", "[1]"), ("until", "soon"), ("unit", "x"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_an_error(key: str, text: str) -> None:
    with pytest.raises(ToolCallError, match=rf"parameter '{key}' of weather is .*, expected "):
        arguments(**{key: text})


def test_references_and_alternatives_of_schemas() -> None:
    root = {"$defs": {"size": {"type": "integer"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "boolean"}]}}}
    box = tool(
        "box", root, size={"$ref": "#/$defs/size"}, loop={"allOf": [{"$ref": "#/$defs/loop"}]}, lost={"$ref": "#/x/y"}
    )
    calls, _ = parse_tool_calls(written("box", size="4", loop="true", lost="5"), [box])
    assert calls[0]["arguments"] == {"size": 4, "loop": True, "lost": "5"}


@pytest.mark.parametrize(
    "tools",
    [
        None,
        [],
        [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}],
        [{}],
        [{"function": 1}],
    ],
    ids=["none", "empty", "bare", "no function", "no object"],
)
def test_tools_may_be_missing_or_bare(tools: Any) -> None:
    assert parse_tool_calls(written("weather", city="7"), tools)[0] == [{"name": "weather", "arguments": {"city": "7"}}]


def test_types_of_schemas_written_by_hand() -> None:
    loose = tool("loose", a={"type": "int"}, b={"type": "dict"}, c={"type": "any"}, d={"type": "float"})
    calls, _ = parse_tool_calls(written("loose", a="1", b="{}", c="1", d="1.5"), [loose])
    assert calls[0]["arguments"] == {"a": 1, "b": {}, "c": "1", "d": 1.5}


def test_several_calls_and_the_text_around_them() -> None:
    text = f"First.\n\n{written('a', x='1')}\nThen.\n{written('b')}\n"
    calls, rest = parse_tool_calls(text)
    assert calls == [{"name": "a", "arguments": {"x": "1"}}, {"name": "b", "arguments": {}}]
    assert rest == "First.\n\n\nThen."


def test_text_without_calls() -> None:
    assert parse_tool_calls(" Sunny, <b>12</b> °C. \n") == ([], "Sunny, <b>12</b> °C.")
    assert parse_tool_calls("") == ([], "")


def test_reasoning_is_not_searched() -> None:
    thought = "I could write <tool_call> now, or </tool_call>.\n</think>\n\n"
    calls, rest = parse_tool_calls(thought + written("a"))
    assert (calls, rest) == ([{"name": "a", "arguments": {}}], thought.strip())


def test_json_form() -> None:
    call = {"name": "a", "arguments": {"x": 1, "y": ["</tool_call>", None]}}
    text = f"Well:\n<tool_call>\n{json.dumps(call)}\n</tool_call>\n<tool_call>{json.dumps(call)}</tool_call>"
    assert parse_tool_calls(text, [tool("a", x={"type": "integer"}, y={})]) == ([call, call], "Well:")


STORE = tool(
    "store", {"required": ["note"]}, note={"type": "string"}, count={"type": "integer"}, big={"type": "boolean"}
)


@pytest.mark.parametrize(
    ("written_call", "arguments"),
    [
        ('{"name": "store", "arguments": {"note": "a", "count": "3"}}', {"note": "a", "count": 3}),
        ('{"name": "store", "arguments": {"note": "a\nb", "big": "TRUE"}}', {"note": "a\nb", "big": True}),
        ('{"name": "store", "arguments": {"note": 12}}', {"note": "12"}),
        ('{"name": "store", "arguments": "{\\"note\\": \\"a\\", \\"count\\": 3.0}"}', {"note": "a", "count": 3}),
        ("{'name': 'store', 'arguments': {'note': 'a', 'big': False}}", {"note": "a", "big": False}),
        ('{"name": "store", "parameters": {"note": "a"}}', {"note": "a"}),
        ('[{"name": "store", "arguments": {"note": "</tool_call>"}}]', {"note": "</tool_call>"}),
    ],
)
@pytest.mark.parametrize("line", ["\n", "\r\n", " "], ids=["LF", "CRLF", "space"])
def test_json_forms_that_models_write(written_call: str, arguments: dict[str, Any], line: str) -> None:
    text = f"<tool_call>{line}{written_call}{line}</tool_call>"
    assert parse_tool_calls(text, [STORE]) == ([{"name": "store", "arguments": arguments}], "")


PING = {"type": "function", "function": {"name": "ping"}}
OPEN = tool("open", {"additionalProperties": True}, a={"type": "integer"})


def test_functions_without_parameters_and_open_ones() -> None:
    assert parse_tool_calls('<tool_call>{"name": "ping"}</tool_call>', [PING])[0] == [{"name": "ping", "arguments": {}}]
    assert parse_tool_calls(written("open", a="1", b="1"), [OPEN])[0][0]["arguments"] == {"a": 1, "b": "1"}
    with pytest.raises(ToolCallError, match="ping has no parameter 'x'"):
        parse_tool_calls(written("ping", x="1"), [PING])


LOST = "<tool_call><function=store><parameter=note>\nmilk{}<parameter=count>\n3\n</parameter></function></tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        *(
            LOST.format(end)
            for end in ("\n", "", "\n</note>\n", "</parameter1>", "\n</paramter>\n", "\n</PARAMETER>\n")
        ),
        written("store", note="a", coutn="3"),
        written("store", note="a", extra="1"),
        written("store", count="3"),
        written("store"),
        written("other", note="a"),
        written("store", note="a").replace("</parameter>", "</parameter1>"),
        written("store", note="a").replace("</function>", "</func>"),
        written("store", note="a\n<parameter=zzz>\n3"),
        '<tool_call>{"name": "store", "arguments": {"count": 1}}</tool_call>',
        '<tool_call>{"name": "store", "arguments": {"note": "a", "x": 1}}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "store", "arguments": {"note": null}}</tool_call>',
        '<tool_call>{"name": "store", "arguments": {"note": "a", "count": 1.5}}</tool_call>',
        '<tool_call>{"name": "store", "arguments": "note=a"}</tool_call>',
    ],
)
def test_a_call_that_the_schemas_do_not_allow_is_an_error_that_keeps_the_good_ones(text: str) -> None:
    good = written("store", note="good", count="1")
    for reply in (f"{good}\n{text}", f"{text}\n{good}"):
        with pytest.raises(ToolCallError) as caught:
            parse_tool_calls(reply, [STORE])
        assert caught.value.calls == ({"name": "store", "arguments": {"note": "good", "count": 1}},), reply


@pytest.mark.parametrize("end", ["", "\n</tool_call>", "</tool_call>"], ids=["none", "closed", "closed at once"])
def test_calls_without_their_wrapper(end: str) -> None:
    text = written("store", note="a").removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    call = {"name": "store", "arguments": {"note": "a"}}
    assert parse_tool_calls(f"Well.\n{text}{end}", [STORE]) == ([call], "Well.")
    assert parse_tool_calls(f"{text}{end}\n{text}{end}", [STORE]) == ([call, call], "")
    assert parse_tool_calls(json.dumps(call) + end, [STORE]) == ([call], "")
    assert parse_tool_calls(json.dumps(call, indent=2), [STORE]) == ([call], "")


@pytest.mark.parametrize(
    "text",
    ["Write <function=store> to call it.", "<function=other>", '{"name": "Bo", "arguments": {}}', '{"name": "store"}'],
)
def test_text_about_calls_is_text(text: str) -> None:
    assert parse_tool_calls(text, [STORE]) == ([], text)


def test_several_calls_in_one_wrapper() -> None:
    one, two = (written("store", note=note).removeprefix("<tool_call>").removesuffix("</tool_call>") for note in "ab")
    calls, _ = parse_tool_calls(f"<tool_call>{one}{two}</tool_call>", [STORE])
    assert [call["arguments"]["note"] for call in calls] == ["a", "b"]


DRAFT = f"I could call {written('store', note='draft')} or"


def test_reasoning_is_known_and_not_guessed() -> None:
    call = {"name": "store", "arguments": {"note": "a"}}
    assert parse_tool_calls(DRAFT, [STORE], thinking=True, finish_reason="length") == ([], DRAFT)
    assert parse_tool_calls(f"{DRAFT}</think>{written('store', note='a')}", [STORE], thinking=True)[0] == [call]
    inside = written("store", note="</think>")
    for thinking in (False, None):
        assert parse_tool_calls(inside, [STORE], thinking=thinking)[0][0]["arguments"] == {"note": "</think>"}
    assert parse_tool_calls(f"<think>{DRAFT}</think>{written('store', note='a')}", [STORE], thinking=False)[0] == [call]


def test_the_error_of_a_call_that_was_cut_says_why() -> None:
    with pytest.raises(ToolCallError, match=r"ends inside a tool call.*max_tokens was reached"):
        parse_tool_calls(written("store", note="a")[:-5], [STORE], finish_reason="length")


GOOD = written("a", x="1", y="2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>", "ends inside a tool call"),
        ("<tool_call>\nweather()\n</tool_call>", "expected <function="),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", "expected <function=NAME>"),
        ("<tool_call>\n<function=a\n>\n</function>\n</tool_call>", "expected <function=NAME>"),
        ("<tool_call>\n<function=a>\nx=1\n</function>\n</tool_call>", "expected <parameter="),
        ("<tool_call>\n<function=a>\n<parameter=x>\n1\n</function>\n</tool_call>", "expected a value and </parameter>"),
        (GOOD.replace("</function>", ""), "expected </function>"),
        (GOOD.replace("=y", "=x"), "'x' of a is given twice"),
        (GOOD.removesuffix("</tool_call>"), "ends inside a tool call.*expected </tool_call>"),
        (GOOD + "</tool_call>", "without <tool_call>"),
        (GOOD.removeprefix("<tool_call>"), "without <tool_call>"),
        ('<tool_call>\n{"name": "a", "arguments": {"x": \n</tool_call>', "no JSON object"),
        ('<tool_call>\n{"name": "a", "arguments": {}}', "ends inside a tool call.*expected </tool_call>"),
        ('<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>', 'expected {"name": string'),
        ('<tool_call>\n{"name": "a", "arguments": "x"}\n</tool_call>', 'expected {"name": string'),
    ],
)
def test_malformed_calls(text: str, message: str) -> None:
    with pytest.raises(ToolCallError, match=message):
        parse_tool_calls("Let me see. " + text)


@pytest.mark.parametrize("end", range(len("<tool_call>"), len(GOOD)))
def test_a_cut_call_is_never_taken_for_a_whole_one(end: int) -> None:
    with pytest.raises(ToolCallError):
        parse_tool_calls(GOOD[:end])


NAMES = st.text(st.characters(exclude_characters="<>\n", exclude_categories=["Cs", "Zs", "Cc"]), min_size=1)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
JSON_TYPES = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


def test_a_chat_template_writes_what_is_read(qwen: SimpleNamespace) -> None:
    expected = [
        {"name": "weather", "arguments": {"city": "Köln\n<b>", "days": 3, "metric": False, "tags": ["°C", None]}},
        {"name": "weather", "arguments": {"note": None, "where": {"x": 0.5}}},
    ]
    messages = [{"role": "user", "content": "?"}]
    prompt = qwen.ours.apply_chat_template(messages, enable_thinking=True)
    reply = {"role": "assistant", "reasoning_content": "<tool_call>?", "content": "Well.", "tool_calls": expected}
    text = qwen.ours.apply_chat_template([*messages, reply], add_generation_prompt=False)
    text = text.removeprefix(prompt).partition("<|im_end|>")[0]
    assert parse_tool_calls(text, [WEATHER]) == (expected, "<tool_call>?\n</think>\n\nWell.")


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3))
@example([("f", {"name": None, "root": "x"})])
def test_calls_come_back_as_they_were_written(calls: list[tuple[str, dict[str, Any]]]) -> None:
    text, tools = "", []
    for number, (name, values) in enumerate(calls):
        name = f"{name}{number}"
        tools.append(tool(name, **{key: {"type": JSON_TYPES[type(value)]} for key, value in values.items()}))
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        text += written(name, **texts)
    expected = [{"name": f"{name}{i}", "arguments": values} for i, (name, values) in enumerate(calls)]
    assert parse_tool_calls(text, tools) == (expected, "")


@given(st.text(st.sampled_from('ax1{}[]"\n') | st.just("é"), max_size=20) | st.sampled_from([GOOD]), st.data())
def test_any_text_gives_calls_or_our_error(text: str, data: st.DataObject) -> None:
    pieces = ["<tool_call>", "</tool_call>", "<function=a>", "</function>", "<parameter=x>", "</parameter>", "</think>"]
    soup = "".join(data.draw(st.lists(st.sampled_from([*pieces, text]), max_size=8)))
    try:
        calls, rest = parse_tool_calls(soup, [WEATHER])
    except FlashMoEError:
        return
    assert all(set(call) == {"name", "arguments"} for call in calls)
    assert isinstance(rest, str)
