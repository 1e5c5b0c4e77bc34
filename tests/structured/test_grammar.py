"""Tool calls: every call that a grammar lets through parses and fits its schema, even one drawn at random."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flash_moe import ArgumentError
from flash_moe.structured import Grammars, reply_grammar, response_format
from flash_moe.structured.tags import has_tag, tagless, tagless_beside
from flash_moe.text import Tokenizer
from flash_moe.text.tool_calls import parse_tool_calls
from flash_moe.text.tool_schemas import from_text

CASES = Path(__file__).parents[2] / "models" / "eval" / "tool_calls.jsonl"
SHORT = {"type": "string", "maxLength": 5}


def function(properties: dict[str, Any], required: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


NODE: dict[str, Any] = {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {
    "type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 1}}, "required": ["v"]}  # fmt: skip
A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}


def anywhere(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = {
    "no parameters": [{"name": "ping"}, {"name": "pong", "parameters": None}],
    "strings": [function({"a": SHORT, "b": {"type": "string", "enum": ["x", "y\nz"]}, "c": {"const": "k"}}, ["a", "c"])],
    "found in text": [function({"a": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 9},
                                "b": {"type": "string", "pattern": "q", "maxLength": 4},
                                "c": {"type": "string", "minLength": 2, "maxLength": 3}}, ["a", "b", "c"])],
    "formats": [function({f: {"type": "string", "format": f} for f in ("date", "time", "date-time", "uuid", "ipv4")},
                         ["date", "time", "date-time", "uuid", "ipv4"])],
    "numbers": [function({"i": {"type": "int"}, "n": {"type": "number", "minimum": -2, "maximum": 2}}, ["n"])],
    "flags": [function({"b": {"type": "boolean"}, "n": {"type": ["null", "boolean"]}, "t": {"enum": [True, 3]}}, ["b", "t"])],
    "unions": [function({"a": {"anyOf": [SHORT, {"type": "null"}]}, "b": {"type": ["string", "integer"], "maxLength": 4},
                         "c": {"anyOf": [{"type": "array", "items": {"type": "integer"}, "maxItems": 2}, SHORT]},
                         "d": {"enum": ["1", 2, "z", None]}}, ["a", "b", "c", "d"])],
    "data": [function({"a": {"type": "array", "items": SHORT, "maxItems": 3},
                       "o": {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"]},
                       "m": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}}, ["a", "o"])],
    "references": [function({"p": {"$ref": "#/$defs/P"}, "s": {"$ref": "#/$defs/S"}}, ["p", "s"],
                            **{"$defs": {"P": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
                                         "S": {"type": "string", "enum": ["on", "off"]}}})],
    "several": [function({f"p{i}": {"type": "integer"} for i in range(5)}, ["p3", "p1"], "many"),
                function({f"q{i}": {"type": "boolean"} for i in range(70)}, ["q1"], "too many for any order"),
    ],
    "a recursive class": [anywhere(**{"$defs": {"Node": NODE}, "$ref": "#/$defs/Node"})],
    "schemas together": [anywhere(**{"$defs": {"A": A}}, allOf=[{"$ref": "#/$defs/A"}, B])],
    "one of two schemas": [anywhere(anyOf=[A, B, {"type": "null"}])],
    "one of two parameters": [anywhere(type="object", properties={**A["properties"], **B["properties"]},
                                       anyOf=[{"required": ["a"]}, {"required": ["b"]}])],
    "pointers": [function({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}, "c": {"$ref": "#/$defs/x~1%20y"},
                           "d": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}}, ["a", "b", "c"],
                          **{"$defs": {"x/ y": {"type": "boolean"}}})],
    "required by name": [function({}, ["a"], additionalProperties={"type": "integer"})],
}  # fmt: skip
FORMATS = jsonschema.FormatChecker()
FORMATS.checks("time")(lambda text: True)
FORMATS.checks("date-time")(lambda text: True)


def check(calls: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    functions = {f["name"]: f for f in (tool.get("function", tool) for tool in tools)}
    for call in calls:
        schema = json.loads(json.dumps(functions[call["name"]].get("parameters") or {}).replace('"int"', '"integer"'))
        if not schema or "properties" in schema:
            schema.setdefault("additionalProperties", False)
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(call["arguments"])


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", TOOLS)
def test_random_calls_parse_and_fit(
    name: str, form: Any, tags: tuple[int, int], wander: Callable[[str, int], str]
) -> None:
    tools = TOOLS[name]
    grammar = reply_grammar(tools, "required", form, tags, None)
    for seed in range(5):
        text = wander(grammar, seed)
        calls, _ = parse_tool_calls(text, tools)
        assert calls, text
        check(calls, tools)


def test_the_number_of_parameters_is_bounded(tags: tuple[int, int], takes: Callable[[str, str], bool]) -> None:
    properties = {key: {"type": "integer"} for key in "abc"}
    bounds = {"minProperties": 2, "maxProperties": 2}
    grammar = reply_grammar([function(properties, ["b"], **bounds)], "auto", "text", tags, None)
    head, tail = CALL.split("<parameter=a>\n{}\n</parameter>\n")
    found = [
        head + "".join(f"<parameter={key}>\n1\n</parameter>\n" for key in keys) + tail
        for keys in ("", "b", "cb", "ba", "ca", "abc")
    ]
    assert [takes(grammar, text) for text in found] == [False, False, True, True, False, False]


def test_calls_of_the_evaluation_are_taken(
    tokenizer: Tokenizer, tags: tuple[int, int], takes: Callable[[str, str], bool]
) -> None:
    """As the chat template writes them, and with their parameters in reverse."""
    for line in CASES.read_text().splitlines()[:25]:
        case = json.loads(line)
        if not case["calls"]:
            continue
        grammar = reply_grammar(case["tools"], "auto", "text", tags, None)
        for order in (1, -1):
            calls = [c | {"arguments": dict(list(c["arguments"].items())[::order])} for c in case["calls"]]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
            prompt = tokenizer.apply_chat_template(case["messages"])
            whole = tokenizer.apply_chat_template([*case["messages"], message], add_generation_prompt=False)
            assert takes(grammar, whole[len(prompt) :].removesuffix("<|im_end|>\n")), case


CALL = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
ONE = [function({"a": {"type": "string"}}, ["a"])]


@pytest.mark.parametrize(
    ("choice", "text", "taken"),
    [
        ("auto", "Just text, with < and > and <b>.", True),
        ("auto", "", True),
        ("auto", CALL.format("x"), True),
        ("auto", "First this.\n\n" + CALL.format("x") + "\n" + CALL.format("y"), True),
        ("auto", CALL.format("x") + " and text", False),
        ("auto", CALL.format("x").replace("=f>", "=g>"), False),
        ("auto", CALL.format("x").replace("=a>", "=b>"), False),
        ("auto", "<tool_call>\n<function=f>\n</function>\n</tool_call>", False),  # a required parameter is missing
        ("auto", "<function=f>", False),
        ("auto", CALL.format("<p>1 < 2</p> </param> <<think"), True),
        ("auto", CALL.format("a\n</parameter>\n<parameter=z>\nb"), False),
        ("auto", CALL.format("</think>"), False),
        ("required", CALL.format("x"), True),
        ("required", "I will: " + CALL.format("x"), True),
        ("required", "No.", False),
        ("required", "x" * 2000, False),
        ("f", CALL.format("x"), True),
        ("f", "I will: " + CALL.format("x"), False),
        ("f", CALL.format("x") + "\n" + CALL.format("x"), False),
    ],
)
def test_choices(choice: str, text: str, taken: bool, tags: tuple[int, int], takes: Callable[[str, str], bool]) -> None:
    assert takes(reply_grammar(ONE, choice, "text", tags, None), text) is taken


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": ["string", "integer"], "minimum": 100}, ["abc", "300", "a3"], ["3", "-1", " 7"]),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}, ["a", "[1]"], ["[true]", "(1, 'a')"]),
        ({"enum": ["1", 2, "z"]}, ["2", "z"], ["1", '"z"', "zz"]),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}, ["ab", "null", "None"], ["abc", "none"]),
        ({"type": "boolean"}, ["true", "True"], ["yes"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_text_that_reads_as_another_value_has_to_fit_that(
    schema: Any, taken: list[str], refused: list[str], tags: tuple[int, int], takes: Callable[[str, str], bool]
) -> None:
    grammar = reply_grammar([function({"a": schema}, ["a"])], "auto", "text", tags, None)
    assert [text for text in [*taken, *refused] if takes(grammar, CALL.format(text))] == taken


@pytest.mark.parametrize("schema", ["array", "object"])
@pytest.mark.parametrize("pattern", [r"^\S+@\S+$", r"^.+/.+$"])
def test_a_long_string_with_a_pattern_inside_data(
    pattern: str, schema: str, tags: tuple[int, int], tokenizer: Tokenizer, grammars: Grammars
) -> None:
    """Tags and pattern are checked at once, which is costly for a text that begins like a tag or has not matched yet."""
    text = {"type": "string", "pattern": pattern}
    data = {"array": {"type": "array", "items": text}, "object": function({"e": text}, ["e"])["function"]["parameters"]}
    constraint = grammars.constraint(reply_grammar([function({"a": data[schema]}, ["a"])], "f", "text", tags, None))
    begin = CALL.split("{}")[0] + {"array": '["', "object": '{"e":"'}[schema]
    for n, token in enumerate(tokenizer.encode(begin + "feyping2,parametersamk.</tool" + "rolt" * 120)):
        constraint.forced()
        assert constraint.allows(token) and (n > 20 or constraint.allowed()[token])
        constraint.accept(token)


def test_a_required_parameter_need_not_be_declared(tags: tuple[int, int], takes: Callable[[str, str], bool]) -> None:
    grammar = reply_grammar([function({}, ["a"], additionalProperties=True)], "auto", "text", tags, None)
    assert takes(grammar, CALL.format("x")) and not takes(grammar, CALL.format("x").replace("=a>", "=b>"))


def test_a_format_beside_tools(tags: tuple[int, int], takes: Callable[[str, str], bool]) -> None:
    grammar = reply_grammar(ONE, "auto", "text", tags, response_format(["yes", "no"]))
    assert takes(grammar, "yes") and takes(grammar, CALL.format("x")) and not takes(grammar, "maybe")


def test_a_tag_spelled_out_of_other_tokens_is_refused(
    tokenizer: Tokenizer, grammars: Grammars, tags: tuple[int, int]
) -> None:
    constraint = grammars.constraint(reply_grammar(ONE, "auto", "text", tags, None))
    pieces = [token for part in ("<", "tool", "_", "call", ">") for token in tokenizer.encode(part)]
    assert not set(pieces) & set(tags) and tokenizer.decode(pieces) == "<tool_call>"
    taken = 0
    for token in pieces:
        if not constraint.allows(token):
            break
        constraint.accept(token)
        taken += 1
    assert taken < len(pieces)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"description": "no name"}, "with a name"),
        ("f", "with a name"),
        ({"name": "a>b"}, "rename"),
        (function({"a<b": {}}, []), "rename"),
        (function({"a ": {}}, []), "rename"),
        (function({}, ["a"]), "declare"),
        ({"name": "f", "parameters": [1]}, "expected a JSON schema"),
        (function({"a": {"type": "array", "uniqueItems": True}}, []), r"f\.a has the keyword 'uniqueItems'"),
        (function({"a": {"type": "string", "format": "regex"}}, []), "format 'regex'"),
        (function({"a": {"allOf": [{"type": "string"}, {"minLength": 3}]}}, []), "merge"),
        (function({"a": {"$ref": "#/$defs/b"}}, []), r"#/\$defs/b"),
        (function({"a": {"enum": ["1"], "type": ["string", "integer"]}}, []), None),
        (function({"a": {"const": "<think>"}}, []), "no value that can be written"),
        (function({"a": {"type": "string", "pattern": "^<think>$"}}, []), "no string in a call"),
        (
            function({"a": {"type": "array", "items": {"const": "x</parameter>"}}}, []),
            r"f\.a\.items has a key or a value",
        ),
        (function({"a": {"type": "object", "properties": {"<think>": {}}}}, []), r"f\.a has a key or a value"),
        (anywhere(oneOf=[A, B]), "use anyOf"),
        (anywhere(allOf=[{**A, "additionalProperties": False}, B]), "closed"),
        (anywhere(anyOf=[{"$ref": "#"}, A]), "by themselves"),
        (anywhere(**{"$ref": "#"}), "without end"),
        (function({"a": {"enum": [2**53]}}, []), "integer 9007199254740992"),
        (function({"a": {"type": ["string", []]}}, []), "expected a type"),
        (function({"a": {"type": "string", "pattern": 5}}, []), "expected a string"),
        (function({}, 5), "list of strings"),
        (anywhere(type="string"), "no object"),
        (anywhere(**A, dependentRequired={"a": ["b"]}), "dependentRequired"),
        (anywhere(type="object", minProperties=1), "at least 1 and at most 0"),
        (function({"xa": {}}, [], patternProperties={"^x": {"type": "integer"}}), "patternProperties"),
    ],
    ids=str,
)
def test_tools_that_cannot_be_enforced(tool: Any, message: str | None, tags: tuple[int, int]) -> None:
    if message is None:
        assert reply_grammar([tool], "auto", "text", tags, None)
    else:
        with pytest.raises(ArgumentError, match=message):
            reply_grammar([tool], "auto", "text", tags, None)


def test_an_unknown_function_is_named(tags: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match=r"'g', expected .*\['f'\]"):
        reply_grammar(ONE, "g", "text", tags, None)


PIECES = ["n", "N", "u", "nul", "null", "None", "true", "T", "x", " ", "\n", "1", "-", "[1]", "{", "<p>", "<", "</",
          "<parameter=", "</function", "parameter", "=", "think>", "e", "(", ")", "'", '"', ",", "u'", "#", "+1"]  # fmt: skip


@pytest.mark.parametrize(
    "others", [(), ("null",), ("boolean", "null"), ("integer",), ("null", "array", "number"), ("object",)], ids=str
)
def test_patterns_of_strings_say_what_the_parser_reads(others: tuple[str, ...]) -> None:
    import random

    rng = random.Random(0)
    pattern = re.compile(tagless_beside(others, 64) if others else tagless(64), re.S)
    taken = 0
    for _ in range(6000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 4)))
        reads = from_text(text, frozenset({*others, "string"}), "")
        safe = isinstance(reads, str) and not has_tag(text)
        if pattern.fullmatch(text):
            taken += 1
            assert safe, text
        elif not others:
            assert not safe, text
    assert taken > 500
