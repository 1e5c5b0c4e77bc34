"""Checks that JSON schemas are well-formed in the keywords that grammars enforce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import ArgumentError
from ..text.tool_schemas import resolve
from .schema import subschemas, types_of

_EXACT = 2**53  # llguidance holds numbers as doubles, which represent all smaller integers


def check_schema(schema: Mapping[str, Any], where: str) -> None:
    """Raises ArgumentError if a keyword of a schema is malformed, or if no finite value fits the schema.

    Args:
        where: the schema's name in errors.
    """
    try:
        for part in subschemas(schema):
            for keyword, (fits, expected) in _KEYWORDS.items():
                if keyword in part and not fits(part[keyword]):
                    raise ArgumentError(
                        f"the schema of {where} has {keyword}: {part[keyword]!r:.80}, expected {expected}; correct it"
                    )
            for value in _scalars([part.get("enum"), part.get("const")]):
                if isinstance(value, int) and abs(value) >= _EXACT:
                    raise ArgumentError(
                        f"the schema of {where} requires the integer {value}, but grammars have no integers from 2^53 on; "
                        "make it a string"
                    )
        if not _finite(schema, schema, (), set()):
            raise ArgumentError(
                f"every value of the schema of {where} contains a further value of it, without end; make one optional"
            )
    except RecursionError:
        raise ArgumentError(f"the schema of {where} is nested too deep; flatten it") from None


def _finite(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...], known: set[str]) -> bool:
    """Returns whether a finite value may fit a schema. References out of the schema count as finite.

    Args:
        seen: references that lead to the schema.
        known: references to finite schemas; this function adds those that it finds.
    """

    def finite(part: Any) -> bool:
        return _finite(part, root, seen, known)

    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return True
    if (reference := schema.get("$ref")) is not None and reference not in known:
        if reference in seen or not _finite(resolve(reference, root), root, (*seen, reference), known):
            return False
        known.add(reference)
    needed = list(schema.get("allOf", ()))
    if types_of(schema) == {"object"}:
        needed += [schema.get("properties", {}).get(key) for key in schema.get("required", ())]
    elif types_of(schema) == {"array"} and schema.get("minItems", 0):
        needed.append(schema.get("items"))
    choices = [schema[key] for key in ("anyOf", "oneOf") if key in schema]
    return all(map(finite, needed)) and all(any(map(finite, options)) for options in choices)


def _scalars(data: Any) -> Iterator[Any]:
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    yield from [data] if not parts else ()
    for part in parts:
        yield from _scalars(part)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _exact(value: Any) -> bool:
    return _number(value) and float(value) == value


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _schema(value: Any) -> bool:
    return isinstance(value, (Mapping, bool))


def _keywords() -> Iterator[tuple[str, tuple[Callable[[Any], bool], str]]]:
    for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        yield key, (_count, "an integer from 0 on")
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        yield key, (_exact, "a number that a double represents exactly")
    yield "multipleOf", (lambda value: _number(value) and value > 0, "a number above 0")
    for key in ("$ref", "pattern", "format"):
        yield key, (_text, "a string")
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        yield key, (lambda value: isinstance(value, Mapping) and all(map(_schema, value.values())), "schemas by name")
    for key in ("anyOf", "oneOf", "allOf"):
        yield (
            key,
            (lambda value: isinstance(value, list) and bool(value) and all(map(_schema, value)), "a list of schemas"),
        )
    yield "prefixItems", (lambda value: isinstance(value, list) and all(map(_schema, value)), "a list of schemas")
    yield "required", (_strings, "a list of strings")
    yield "enum", (lambda value: isinstance(value, list) and bool(value), "a list that is not empty")
    yield "type", (lambda value: _text(value) or (bool(value) and _strings(value)), "a type or a list of types")


_KEYWORDS = dict(_keywords())
