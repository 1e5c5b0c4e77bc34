"""Argument types in the schemas of tools, and conversion of a model's text to these types."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from ..errors import ArgumentError, ToolCallError

# Type names that handwritten schemas use in addition to those of JSON.
TYPE_ALIASES = {
    "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array", "str": "string",
    "None": "null",
}  # fmt: skip
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_PYTHON_WORDS = ("True", "False", "None")  # JSON's literals as chat templates write them


@dataclass(frozen=True)
class Function:
    """A function that a model may call.

    Attributes:
        types: JSON types of each declared parameter; empty if its schema allows any type.
        required: parameters that a call must have.
        closed: whether undeclared parameters are rejected.
        others: JSON types of undeclared parameters; empty for any type.
    """

    name: str
    types: Mapping[str, frozenset[str]]
    required: tuple[str, ...] = ()
    closed: bool = True
    others: frozenset[str] = frozenset()

    def takes(self, key: str) -> bool:
        """Returns whether the function accepts a parameter of this name."""
        return key in self.types or not self.closed

    def types_of(self, key: str) -> frozenset[str]:
        """Returns the JSON types of a parameter; empty for any type."""
        return self.types.get(key, self.others)

    def argument(self, key: str, value: Any, written: bool) -> Any:
        """Converts the value of a parameter to its declared type.

        Args:
            written: whether the value was written as plain text, not as JSON.

        Raises:
            ToolCallError: the parameter is not declared, or the value has none of its types.
        """
        if not self.takes(key):
            raise ToolCallError(
                f"{self.name} has no parameter {key!r}, expected one of {list(self.types)}; generate the reply again"
            )
        types, what = self.types_of(key), f"parameter {key!r} of {self.name}"
        return from_text(value, types, what) if written else from_json(value, types, what)

    def require(self, arguments: Mapping[str, Any]) -> None:
        """Raises ToolCallError if a required parameter is missing."""
        if missing := [key for key in self.required if key not in arguments]:
            raise ToolCallError(
                f"the call of {self.name} lacks the required {', '.join(map(repr, missing))}; generate the reply again"
            )


def functions(tools: Iterable[Mapping[str, Any]]) -> dict[str, Function]:
    """Returns the functions by name, from schemas in OpenAI's form or without its wrapper."""
    found = {}
    for tool in tools:
        function = _mapping(_mapping(tool).get("function", tool))
        if isinstance(name := function.get("name"), str):
            try:
                found[name] = _function(name, _mapping(function.get("parameters")))
            except RecursionError:
                raise ArgumentError(f"the schema of {name!r:.80} is nested too deep to read; flatten it") from None
    return found


def resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """Returns the part of a schema to which a local ``$ref`` points (RFC 6901); None if there is none."""
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        return None
    target: Any = root
    for step in unquote(reference).split("/")[1:]:
        if isinstance(target, list):
            target = dict(enumerate(target)).get(int(step) if step.isdecimal() else -1)
        else:
            target = _mapping(target).get(step.replace("~1", "/").replace("~0", "~"))
    return target


def from_text(text: str, types: frozenset[str], what: str) -> Any:
    """Converts ``text`` to a value of one of the declared types.

    Args:
        types: JSON types that the value may have. If string is one of several, the others are tried first.
        what: name of the parameter in errors.

    Raises:
        ToolCallError: the value has none of the types.
    """
    others = types - {"string"}
    if not others:
        return text
    for value in _readings(text, types):
        if any(_is(value, name) for name in others):
            return _typed(value, others)
    if "string" in types:
        return text
    raise _mismatch(text, types, what)


def from_json(value: Any, types: frozenset[str], what: str) -> Any:
    """Converts a JSON value to one of its declared types: parses text, or writes a number as text, if necessary.

    Raises:
        ToolCallError: the value has none of the types.
    """
    if not types or any(_is(value, name) for name in types):
        return _typed(value, types)
    if isinstance(value, str):
        return from_text(value, types, what)
    if "string" in types and isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise _mismatch(value, types, what)


def loads(text: str) -> Any:
    """Parses JSON, whose strings may contain line breaks, or a Python literal.

    Raises:
        ValueError: the text is neither, or contains values that JSON cannot represent.
    """
    try:
        return _json(text)
    except (ValueError, RecursionError) as error:
        try:
            return _plain(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(str(error)) from None


def finite(text: str) -> float:
    """Parses a float. Raises ValueError if it overflows, because JSON has no infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _json(text: str) -> Any:
    return json.loads(text, strict=False, parse_constant=finite, parse_float=finite)


def _readings(text: str, types: frozenset[str]) -> Iterator[Any]:
    """Yields the values that a text can represent, other than the text itself."""
    word = text.strip()
    # If a string is allowed, "none" is a string.
    if word in _PYTHON_WORDS or ("string" not in types and word.lower() in _WORDS):
        yield _WORDS[word.lower()]
        return
    try:
        yield loads(text) if types & {"object", "array"} else _json(text)
    except (ValueError, RecursionError):
        return  # the text has none of the other types


def _plain(value: Any) -> Any:
    """Converts a Python literal to JSON data."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{value!r:.80} is no JSON data")


def _typed(value: Any, types: frozenset[str]) -> Any:
    return int(value) if isinstance(value, float) and "integer" in types and "number" not in types else value


def _mismatch(value: Any, types: frozenset[str], what: str) -> ToolCallError:
    return ToolCallError(f"{what} is {value!r:.200}, expected {' or '.join(sorted(types))}; generate the reply again")


def _function(name: str, schema: Mapping[str, Any]) -> Function:
    parts = list(_parts(schema, schema, (), True))
    types: dict[str, frozenset[str]] = {}
    for part, _ in parts:
        for key, value in _mapping(part.get("properties")).items():
            found, known = frozenset(_types(value, schema, ())), types.get(str(key))
            types[str(key)] = found if known is None else found | known if found and known else frozenset()
    lists = [part.get("required") for part, always in parts if always]
    required = dict.fromkeys(key for keys in lists if isinstance(keys, list) for key in keys if isinstance(key, str))
    # A function without `parameters` takes none; an object without `properties` takes any.
    free = bool(schema) and not any("properties" in part for part, _ in parts)
    more = [value for part, _ in parts if (value := part.get("additionalProperties"))]
    patterns = any(part.get("patternProperties") for part, _ in parts)
    others = _types(more[0], schema, ()) if len(more) == 1 and not patterns else ()
    return Function(name, types, tuple(required), not (free or more or patterns), frozenset(others))


def _parts(
    schema: Any, root: Mapping[str, Any], seen: tuple[str, ...], always: bool
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yields a schema of an object and those that it combines, and whether an object must fit each of them."""
    schema = _mapping(schema)
    yield schema, always
    if "$ref" in schema and (reference := str(schema["$ref"])) not in seen:
        yield from _parts(resolve(reference, root), root, (*seen, reference), always)
    for key in ("allOf", "anyOf", "oneOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else ():
            yield from _parts(option, root, seen, always and (key == "allOf" or len(options) == 1))


def _types(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...]) -> set[str]:
    """Returns all types that a schema allows, including those of local references and alternatives."""
    schema = _mapping(schema)
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    types = {TYPE_ALIASES.get(name, name) for name in names if isinstance(name, str)} & set(_CHECKS)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            types |= {name for option in options for name in _types(option, root, seen)}
    if "$ref" in schema and (reference := str(schema["$ref"])) not in seen:
        types |= _types(resolve(reference, root), root, (*seen, reference))
    if not types and isinstance(choices := schema.get("enum"), list):
        types = {name for name in _CHECKS for choice in choices if name != "number" and _is(choice, name)}
    return types


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _number(value) and value == int(value),
    "number": _number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _is(value: Any, name: str) -> bool:
    return _CHECKS[name](value)
