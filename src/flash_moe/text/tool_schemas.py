"""Types of the parameters of tools, by their JSON schemas, and values of those types from text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ToolCallError

# Names that schemas written by hand use beside JSON's.
_ALIASES = {
    "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array", "str": "string",
    "None": "null",
}  # fmt: skip
_PYTHON: dict[str, Any] = {"True": True, "False": False, "None": None}  # what chat templates make of JSON's literals


def parameter_types(tools: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, frozenset[str]]]:
    """JSON types by function and parameter; parameters without a declared type are absent."""
    types: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = _mapping(_mapping(tool).get("function", tool))
        parameters = _mapping(function.get("parameters"))
        types[str(function.get("name"))] = {
            key: found
            for key, schema in _mapping(parameters.get("properties")).items()
            if (found := frozenset(_types(schema, parameters, ())))
        }
    return types


def from_text(text: str, types: frozenset[str], what: str) -> Any:
    """The value that ``text`` writes.

    Args:
        types: JSON types it may have; where a string is one of several, the others are tried first.
        what: is given, for the error.

    Raises:
        ToolCallError: it is of none of the types.
    """
    others = types - {"string"}
    if not others:
        return text
    try:
        value = _PYTHON[text.strip()] if text.strip() in _PYTHON else json.loads(text)
    except (ValueError, RecursionError):
        value = text  # of none of the other types
    if any(_is(value, name) for name in others):
        return int(value) if isinstance(value, float) and "number" not in others else value
    if "string" in types:
        return text
    raise ToolCallError(f"{what} is {text!r:.200}, expected {' or '.join(sorted(types))}; generate the reply again")


def _types(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...]) -> set[str]:
    """All types that a schema allows, through local references and alternatives."""
    schema = _mapping(schema)
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    types = {_ALIASES.get(name, name) for name in names if isinstance(name, str)} & set(_CHECKS)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            types |= {name for option in options for name in _types(option, root, seen)}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and reference not in seen:
        target: Any = root
        for step in reference[2:].split("/"):
            target = _mapping(target).get(step)
        types |= _types(target, root, (*seen, reference))
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
