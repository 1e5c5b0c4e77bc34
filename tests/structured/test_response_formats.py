"""What response_format= may be: every reply that a grammar lets through fits, even one drawn at random."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field, field_validator

from flash_moe import ArgumentError
from flash_moe.errors import FormatError
from flash_moe.structured import reply_grammar, response_format
from flash_moe.structured.schema import MAX_CHARACTERS, enforceable, reaches_bound


class Item(BaseModel):
    name: str = Field(max_length=8)
    price: float = Field(ge=0, le=100)
    tags: set[Literal["new", "old"]] = Field(default=set(), max_length=3)


class Order(BaseModel):
    customer: str = Field(max_length=10)
    day: datetime.date
    items: list[Item] = Field(min_length=1, max_length=2)
    note: str | None = Field(default=None, max_length=5)


def grammar(wanted: Any) -> str:
    return reply_grammar((), "auto", "text", None, response_format(wanted))


STRING = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object", "properties": {"a": {"type": "integer"}, "b": STRING}, "required": ["a", "b"]},
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}},
    "number": {"type": "number"},
    "small number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1e-7},
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 99}, "maxItems": 4},
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 7}, "minItems": 2, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, STRING], "items": False, "minItems": 2},
    "enum": {"enum": ["red", "green", 3, None, True]},
    "const": {"type": "object", "properties": {"kind": {"const": "x"}, "n": {"const": 2.5}}, "required": ["kind", "n"]},
    "union": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    "tagged": {"oneOf": [
        {"type": "object", "properties": {"t": {"const": t}, "v": {"type": t}}, "required": ["t", "v"]}
        for t in ("integer", "boolean")
    ]},
    "nested": {"type": "object", "properties": {"p": {"$ref": "#/$defs/point"}}, "required": ["p"],
               "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}}},
    "recursive": {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
        "v": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}}, "required": ["v"]}}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "found pattern": {"type": "string", "pattern": "ab", "maxLength": 9},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "formats": {"type": "object", "properties": {f: {"type": "string", "format": f} for f in ("date", "uuid", "ipv4")},
                "required": ["date", "uuid", "ipv4"]},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "combined": {"allOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"], "maxProperties": 2},
    ]},
    "types": {"type": ["string", "null", "integer"], "maxLength": 3},
    "own names of types": {"type": "dict", "properties": {"a": {"type": "int"}, "type": {"type": "bool"}},
                           "required": ["a", "type"]},
}  # fmt: skip
JSON_NAMES = {"dict": "object", "int": "integer", "bool": "boolean"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_replies_fit_their_schema(name: str, wander: Callable[[str, int], str]) -> None:
    schema, wanted = SCHEMAS[name], grammar(SCHEMAS[name])
    text = json.dumps(schema)
    for alias, proper in JSON_NAMES.items():
        text = text.replace(f'"type": "{alias}"', f'"type": "{proper}"')
    checker = jsonschema.Draft202012Validator(json.loads(text), format_checker=jsonschema.FormatChecker())
    for seed in range(6):
        checker.validate(json.loads(wander(wanted, seed)))


def test_random_replies_make_instances_of_a_class(wander: Callable[[str, int], str]) -> None:
    format = response_format(Order)
    assert format is not None
    for seed in range(5):
        text = wander(grammar(Order), seed)
        if "-02-29" not in text:  # a date in form only
            assert isinstance(format.parse(text), Order)


@pytest.mark.parametrize(
    ("wanted", "text", "value"),
    [
        (Order, '{"customer": "Kim", "day": "2026-01-31", "items": [{"name": "pen", "price": 1.5}]}', None),
        (list[int], "[1, 2]", [1, 2]),
        ("json", '{"a": [1.25, {"b": null}]}', {"a": [1.25, {"b": None}]}),
        ({"type": "json_object"}, "{}", {}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}, "7", 7),
        ({"type": "json_schema", "name": "n", "schema": {"type": "integer"}}, "7", 7),
        (["yes", "no", 'a"b/c\\é\n'], 'a"b/c\\é\n', 'a"b/c\\é\n'),
        ({"type": "array", "items": {"type": "integer"}}, "[\n    1,\n    2\n]", [1, 2]),
    ],
)
def test_what_fits_is_taken_and_read(wanted: Any, text: str, value: Any, takes: Callable[[str, str], bool]) -> None:
    format = response_format(wanted)
    assert format is not None and takes(grammar(wanted), text)
    assert format.parse(text) == (Order.model_validate_json(text) if value is None else value)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (["yes", "no"], "ye"),
        (["yes", "no"], "yes!"),
        ("json", "[1]"),
        ("json", '{"a": 01}'),
        ("json", '{"' + "k" * 300 + '": 1}'),
        (re.compile("[a-z]+"), "abc1"),
        (SCHEMAS["object"], '{"a": 1, "b": "x", "c": 2}'),  # not declared
        (SCHEMAS["object"], '{"a": 1}'),
        ({"type": "number"}, "3." + "3" * 40),
        ({"type": "integer"}, "1" * 40),
        ({"type": "array", "items": {"type": "integer"}}, "[1,  2]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wanted: Any, text: str, takes: Callable[[str, str], bool]) -> None:
    assert not takes(grammar(wanted), text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)"), "2026-11"),
        (re.compile(r"a/b\\[/x]", re.IGNORECASE), "A/b\\X"),
        (re.compile(r"a.b", re.DOTALL), "a\nb"),
        (re.compile("é\n\"'"), "é\n\"'"),
    ],
)
def test_regular_expressions(pattern: re.Pattern[str], text: str, takes: Callable[[str, str], bool]) -> None:
    format = response_format(pattern)
    assert format is not None and takes(grammar(pattern), text)
    assert format.parse(text).group() == text
    with pytest.raises(FormatError, match="does not match"):
        format.parse(text + "x")


def test_no_format() -> None:
    assert response_format(None) is None and response_format({"type": "text"}) is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("yaml", "'json'"),
        (3, "pydantic class"),
        ([], "not empty"),
        (["a", ""], "not empty"),
        (["a", " <think>b"], "read as reasoning"),
        (re.compile("<think>.*"), "read as reasoning"),
        (re.compile(b"a"), "bytes"),
        (re.compile("a", re.VERBOSE), "VERBOSE"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "text"}}}, "type is 'text'"),
        ({"type": "text", "maxLength": 3}, "type is 'text'"),
        ({"type": "json_schema", "json_schema": {}}, r"json_schema\.schema"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, r"response_format has .*uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, r"response_format\.properties\.a has .*'not'"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, r"properties\.a\.type is 'text'"),
        ({"type": "object", "properties": {"a": 3}}, "expected schemas by name"),
        ({"enum": []}, "not empty"),
        ({"const": {"a": [1, -(2**53) - 1]}}, "integer -9007199254740993, but .* make it a string"),
        ({"type": "number", "minimum": 10**400, "maximum": 0.5}, "a number that a double"),
        ({"type": "integer", "minimum": 2**53 + 1}, "a number that a double"),
        ({"type": "integer", "minimum": "a"}, "minimum: 'a', expected a number"),
        ({"type": "string", "minLength": "a"}, "expected an integer from 0"),
        ({"type": "array", "minItems": None}, "expected an integer from 0"),
        ({"type": "number", "multipleOf": 0}, "above 0"),
        ({"type": "object", "required": 5}, "list of strings"),
        ({"$defs": 5}, "schemas by name"),
        ({"type": []}, "a list of types"),
        ({"anyOf": [{"type": ["string", []]}]}, "a list of types"),
        ({"$ref": "#"}, "without end"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without end"),
        ({"type": "array", "items": {"anyOf": [{"$ref": "#"}]}, "minItems": 1}, "without end"),
        ({"anyOf": {}}, "list of schemas"),
    ],
    ids=str,
)
def test_what_cannot_be_understood_or_enforced(wanted: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        response_format(wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "string", "format": "no such format"},
        {"type": "string", "pattern": "(?=a)b"},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"$ref": "#/$defs/missing"},
        re.compile(r"(?=a)b"),
        re.compile(r"(a)\1"),
    ],
    ids=str,
)
def test_what_llguidance_refuses_is_an_error_before_any_token(wanted: Any, grammars: Any) -> None:
    with pytest.raises(ArgumentError, match="the format cannot be enforced: ") as caught:
        grammars.constraint(grammar(wanted))
    assert "x-guidance" not in str(caught.value) and "coerce_one_of" not in str(caught.value)


def test_a_class_may_refuse_what_fits_its_schema() -> None:
    class Even(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def check(cls, n: int) -> int:
            if n % 2:
                raise ValueError("odd")
            return n

    format = response_format(Even)
    assert format is not None
    with pytest.raises(FormatError, match=r"(?s)Even refuses the reply.*odd"):
        format.parse('{"n": 3}')


def test_bounds_do_not_replace_those_of_a_schema() -> None:
    own = {"type": "string", "maxLength": 10**6}
    assert enforceable(own, "x") == own
    assert enforceable({"type": "string"}, "x")["maxLength"] == MAX_CHARACTERS
    assert enforceable({"type": "array", "items": own, "minItems": 10_000}, "x")["maxItems"] == 10_000
    assert "maximum" not in enforceable({"type": "number", "minimum": 1e20}, "x")


def test_data_that_a_bound_ended() -> None:
    assert reaches_bound({"a": [1, "x" * MAX_CHARACTERS]}) and reaches_bound([0] * 4096)
    assert not reaches_bound({"a": [1, "x" * (MAX_CHARACTERS - 1), None]})
