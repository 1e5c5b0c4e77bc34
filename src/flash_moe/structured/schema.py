"""Prepares JSON schemas for a grammar: rejects unsupported keywords, and bounds unbounded values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from ..text.tool_schemas import TYPE_ALIASES
from .tags import has_tag, tagless

MAX_CHARACTERS = 65_536  # characters of a string
MAX_IN_CALL = 1024  # characters of a string with a pattern in a call; the combined automaton is large
MAX_KEY = 256  # characters of a key that is not declared
MAX_ITEMS = 4_096  # elements of an array
MAX_PROPERTIES = 256  # keys of an object without declared keys
MAX_DEPTH = 6  # levels of data without a schema
_MAX_NUMBER, _RESOLUTION = 10**15, 1e-9  # digits that a double represents exactly

# Keywords that contain subschemas: in a list, by name, or directly. All other keywords contain data.
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_UNENFORCEABLE = frozenset(
    {
        "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
        "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties",
        "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions", "$schema", "$id"}
)
_TAGLESS, _TAGLESS_OF_ANY_LENGTH = f"^{tagless(MAX_CHARACTERS)}$", f"^{tagless(None)}$"


def enforceable(schema: Mapping[str, Any], where: str, in_call: bool = False) -> dict[str, Any]:
    """Returns a schema that allows a subset of the values of `schema`. Its values are finite, unless it refers to
    itself.

    Objects with declared properties are closed, unless the schema permits other properties or combines schemas.

    Args:
        where: the schema's name in errors.
        in_call: whether strings and keys must not contain tags of tool calls, so that a call can contain them as text.

    Raises:
        ArgumentError: the schema is malformed, or has a keyword that a grammar cannot enforce.
    """
    preparation = _Preparation(in_call, closes=not any(map(intersects, subschemas(schema))))
    prepared: dict[str, Any] = preparation.schema(schema, where)
    if preparation.refers_to_any:
        prepared["$defs"] = {**prepared.get("$defs", {}), **preparation.definitions()}
    return prepared


def reaches_bound(value: Any) -> bool:
    """Returns whether JSON data contains a string or an array that reached the length limit of this module."""
    if isinstance(value, str):
        return len(value) >= MAX_CHARACTERS
    if isinstance(value, Mapping):
        return any(map(reaches_bound, value.values()))
    return isinstance(value, list) and (len(value) >= MAX_ITEMS or any(map(reaches_bound, value)))


def subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yields a schema and all of its subschemas."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            parts: Any = value.values()
        elif key in _LISTS + _SINGLE and isinstance(value, list):
            parts = value
        else:
            parts = [value] if key in _SINGLE else []
        for part in parts:
            yield from subschemas(part)


def types_of(schema: Mapping[str, Any]) -> set[str]:
    """Returns the JSON types in the keyword ``type``; empty without that keyword."""
    declared = schema.get("type", ())
    return {TYPE_ALIASES.get(name, name) for name in ([declared] if isinstance(declared, str) else declared)}


def intersects(schema: Mapping[str, Any]) -> bool:
    """Returns whether a value must fit several schemas at once, which may declare different properties."""
    combined = [key for key in ("anyOf", "oneOf", "allOf", "$ref") if key in schema]
    others = set(schema) - ANNOTATIONS - set(combined) - {"type"}
    alternatives = schema.get("allOf", ())
    return len(combined) > 1 or bool(combined and others) or (isinstance(alternatives, list) and len(alternatives) > 1)


def check(schema: Mapping[str, Any], path: str) -> None:
    """Raises ArgumentError if a schema has a keyword that a grammar cannot enforce, or types that JSON lacks."""
    found = sorted(key for key in _UNENFORCEABLE & set(schema) if schema[key] is not False)
    if found:
        raise ArgumentError(
            f"{path} has the keyword {found[0]!r}, which no grammar enforces; remove it, and check the reply yourself"
        )
    declared = schema.get("type", "null")
    names = [declared] if isinstance(declared, str) else declared
    if not isinstance(names, Sequence) or not all(TYPE_ALIASES.get(n, n) in TYPE_ALIASES.values() for n in names):
        raise ArgumentError(f"{path}.type is {declared!r}, expected one or several of JSON's types")


def _check_tags(schema: Mapping[str, Any], path: str) -> None:
    """Raises ArgumentError if data that fits a schema must contain a tag of a call."""
    texts = [schema.get("enum"), schema.get("const"), list(schema.get("properties", ())), schema.get("required")]
    if has_tag(json.dumps(texts, ensure_ascii=False)):
        raise ArgumentError(f"{path} has a key or a value with a tag of a call, as which it would be read; rename it")


class _Preparation:
    def __init__(self, in_call: bool, closes: bool) -> None:
        self._in_call, self._closes = in_call, closes
        self.refers_to_any = False

    def schema(self, schema: Any, path: str) -> Any:
        if schema is False:
            return False
        if schema is True or (isinstance(schema, Mapping) and not set(schema) - ANNOTATIONS):
            return self._any(MAX_DEPTH)
        if not isinstance(schema, Mapping):
            raise ArgumentError(f"{path} is {schema!r:.80}, expected a JSON schema: an object, true or false")
        check(schema, path)
        if self._in_call:
            _check_tags(schema, path)
        result = {key: self._keyword(key, value, f"{path}.{key}") for key, value in schema.items()}
        result.pop("uniqueItems", None)
        if "enum" in schema or "const" in schema:
            return result
        types = types_of(schema)
        if "type" in result:
            result["type"] = sorted(types) if len(types) > 1 else min(types)
        if "string" in types:
            self._bound_string(result)
        if types & {"number", "integer"}:
            _bound_number(result, "integer" in types and "number" not in types)
        if "array" in types:
            result.setdefault("maxItems", max(MAX_ITEMS, result.get("minItems", 0)))
            if not {"items", "prefixItems"} & set(result):
                result["items"] = self._any(MAX_DEPTH)
        if "object" in types or "properties" in result:
            self._bound_object(result)
        return result

    def definitions(self) -> dict[str, Any]:
        """Returns the definitions that the schema of :meth:`_any` refers to."""
        scalar = [{"type": "boolean"}, {"type": "null"}, self._bound_string({"type": "string"}),
                  _bound_number({"type": "number"}, False)]  # fmt: skip
        levels: dict[str, Any] = {_any_name(0): {"anyOf": scalar}}
        for depth in range(1, MAX_DEPTH + 1):
            inner = self._any(depth - 1)
            array = {"type": "array", "items": inner, "maxItems": MAX_ITEMS}
            levels[_any_name(depth)] = {"anyOf": [*scalar, array, self._free_object({"type": "object"}, inner)]}
        return levels

    def _any(self, depth: int) -> dict[str, Any]:
        self.refers_to_any = True
        return {"$ref": f"#/$defs/{_any_name(depth)}"}

    def _keyword(self, key: str, value: Any, path: str) -> Any:
        if key in _MAPS and isinstance(value, Mapping):
            return {name: self.schema(part, f"{path}.{name}") for name, part in value.items()}
        if key in _LISTS or (key == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise ArgumentError(f"{path} is {value!r:.80}, expected a list of schemas")
            return [self.schema(part, f"{path}[{i}]") for i, part in enumerate(value)]
        if key in _SINGLE:
            return self.schema(value, path)
        return value

    def _bound_string(self, schema: dict[str, Any]) -> dict[str, Any]:
        most = MAX_IN_CALL if self._in_call and "pattern" in schema else MAX_CHARACTERS
        schema.setdefault("maxLength", max(most, schema.get("minLength", 0)))
        if self._in_call and "format" not in schema:
            if "pattern" in schema:
                schema["allOf"] = [*schema.get("allOf", ()), {"type": "string", "pattern": _TAGLESS_OF_ANY_LENGTH}]
            else:
                schema["pattern"] = _TAGLESS
        return schema

    def _bound_object(self, schema: dict[str, Any]) -> None:
        declared = schema.get("properties", {})
        missing = [name for name in schema.get("required", ()) if name not in declared]
        if "patternProperties" in schema:
            return
        if declared or missing:
            if missing and schema.get("additionalProperties") is not False:
                other = schema.get("additionalProperties", self._any(MAX_DEPTH))
                schema["properties"] = {**declared, **dict.fromkeys(missing, other)}
            schema.setdefault("additionalProperties", False if self._closes else self._any(MAX_DEPTH))
        elif schema.get("additionalProperties") is not False:
            self._free_object(schema, schema.get("additionalProperties", self._any(MAX_DEPTH)))

    def _free_object(self, schema: dict[str, Any], values: Any) -> dict[str, Any]:
        """Returns the schema of an object without declared keys."""
        schema.setdefault("maxProperties", max(MAX_PROPERTIES, schema.get("minProperties", 0)))
        key = tagless(MAX_KEY) if self._in_call else f"(?s:.{{0,{MAX_KEY}}})"
        schema.update(patternProperties={f"^{key}$": values}, additionalProperties=False)
        return schema


def _any_name(depth: int) -> str:
    return f"any-{depth}"


def _bound_number(schema: dict[str, Any], integer: bool) -> dict[str, Any]:
    """Limits the digits of a number, unless the schema has its own bounds or steps."""
    low, high = (schema.get(f"exclusive{end}", schema.get(end.lower())) for end in ("Minimum", "Maximum"))
    if low is None and (high is None or high > -_MAX_NUMBER):
        schema["minimum"] = -_MAX_NUMBER
    if high is None and (low is None or low < _MAX_NUMBER):
        schema["maximum"] = _MAX_NUMBER
    wide = low is None or high is None or high - low > 1000 * _RESOLUTION
    if not integer and wide:
        schema.setdefault("multipleOf", _RESOLUTION)
    return schema
