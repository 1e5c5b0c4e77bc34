"""Reads the schema of a function's parameters: an object, possibly behind references and combinations of schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import product
from typing import Any

from ..errors import ArgumentError
from ..text.tool_schemas import resolve
from .schema import ANNOTATIONS, check, subschemas, types_of

_MAX_ALTERNATIVES = 64
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf")
_DEFINITIONS = ("$defs", "definitions")


def with_definitions(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns an equal schema whose references all point into its ``$defs``, so that its parts can be moved.

    Raises:
        ArgumentError: a reference does not point into the schema.
    """
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def moved(part: Any) -> Any:
        part = deepcopy(part)
        for found in subschemas(part):
            assert isinstance(found, dict)
            for key in _DEFINITIONS:
                found.pop(key, None)
            if "$ref" in found:
                found["$ref"] = f"#/$defs/{named(found['$ref'])}"
        return part

    def named(reference: str) -> str:
        if reference not in names:
            target = resolve(reference, schema)
            if not isinstance(target, (Mapping, bool)):
                raise ArgumentError(f"found no {reference!r} in the schema of {where}, expected a definition; add it")
            name = re.sub(r"\W+", ".", reference.removeprefix("#/$defs/")).strip(".")
            name = names[reference] = name if name and name not in names.values() else f"{name}.{len(names)}"
            definitions[name] = moved(target)
        return names[reference]

    result: dict[str, Any] = moved(schema)
    return {**result, "$defs": definitions} if definitions else result


def alternatives(schema: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns schemas of objects that together allow what `schema` allows, without references and combinations at the
    top level.

    Args:
        schema: schema of a function's parameters, from :func:`with_definitions`.
        where: the function's name in errors.

    Raises:
        ArgumentError: the combination cannot be split or merged, or has a keyword that no grammar enforces.
    """
    found = [option for option in _split(schema, schema, where, ()) if "object" in (types_of(option) or {"object"})]
    if not found:
        raise ArgumentError(f"the parameters of {where} allow no object, expected the schema of an object")
    for option in found:
        check(option, where)
        if unknown := sorted({"enum", "const"} & set(option)):
            raise ArgumentError(
                f"the parameters of {where} have the keyword {unknown[0]!r}; declare properties instead"
            )
    return found


def _split(schema: Any, root: Mapping[str, Any], where: str, seen: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if schema is False:
        return
    schema = schema if isinstance(schema, Mapping) else {}
    factors = [[{key: value for key, value in schema.items() if key not in (*_COMBINED, "$defs")}]]
    if (reference := schema.get("$ref")) is not None:
        if reference in seen:
            raise ArgumentError(f"the parameters of {where} are defined by themselves ({reference!r}); write them out")
        factors.append(list(_split(resolve(reference, root), root, where, (*seen, reference))))
    factors += [list(_split(part, root, where, seen)) for part in schema.get("allOf", ())]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = [option for part in schema[key] for option in _split(part, root, where, seen)]
            if key == "oneOf" and len(options) > 1:
                raise ArgumentError(
                    f"the parameters of {where} are one of several schemas (oneOf), which no grammar enforces; use anyOf"
                )
            factors.append(options)
    for number, parts in enumerate(product(*factors)):
        if number == _MAX_ALTERNATIVES:
            raise ArgumentError(f"the parameters of {where} combine too many schemas; merge them")
        merged = parts[0]
        for part in parts[1:]:
            merged = _merged(merged, part, where)
        yield merged


def _merged(left: dict[str, Any], right: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the schema of the objects that fit both schemas."""
    for one, other in ((left, right), (right, left)):
        limited = one.get("additionalProperties", True) is not True or "patternProperties" in one
        if limited and set(other.get("properties", ())) - set(one.get("properties", ())):
            raise ArgumentError(f"the parameters of {where} combine closed schemas of objects; merge them")
    merged = {**right, **left}
    for key in set(left) & set(right) - ANNOTATIONS:
        a, b = left[key], right[key]
        if key == "properties":
            both = {name: {"allOf": [a[name], b[name]]} for name in a if name in b and a[name] != b[name]}
            merged[key] = {**b, **a, **both}
        elif key == "required":
            merged[key] = list(dict.fromkeys([*a, *b]))
        elif key == "type":
            merged[key] = sorted(types_of(left) & types_of(right))
        elif key in ("minProperties", "maxProperties"):
            merged[key] = (max if key == "minProperties" else min)(a, b)
        elif a != b:
            raise ArgumentError(f"the parameters of {where} combine schemas that differ in {key!r}; merge them")
    return merged
