"""Grammars for parameter values in text form, between ``<parameter=NAME>`` and ``</parameter>``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ArgumentError, ToolCallError
from ..text.tool_schemas import from_text
from .lark import json_rule, quoted, regex
from .matcher import is_empty
from .schema import MAX_CHARACTERS, MAX_IN_CALL, intersects, types_of
from .tags import has_tag, tagless, tagless_beside

_WORDS = {"True": ("boolean", True), "False": ("boolean", False), "None": ("null", None)}
END = "\n</parameter>\n"
_FORMATS = {
    "date": r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|[0-9]{4}-(?:0[13-9]|1[0-2])-(?:29|30)"
    r"|[0-9]{4}-(?:0[13578]|1[02])-31",
    "time": r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
    "email": r"[A-Za-z0-9_%+-]{1,64}(?:\.[A-Za-z0-9_%+-]{1,64}){0,4}@[A-Za-z0-9][A-Za-z0-9-]{0,60}(?:\.[A-Za-z]{2,24}){1,4}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]{0,30}:[!#-;=?-Z_a-z~]{1,2000}",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
_FORMATS["date-time"] = f"(?:{_FORMATS['date']})T{_FORMATS['time']}"


def value_rule(schema: Any, types: frozenset[str], definitions: Mapping[str, Any], name: str, where: str) -> str:
    """Returns lines of a grammar. Its rule ``name`` is a value of a parameter, followed by the closing tag.

    Args:
        schema: schema of the parameter.
        types: JSON types that the parser of calls expects for the parameter; empty means a string.
        definitions: ``$defs`` and ``definitions`` of the function's schema, for references.
        where: the parameter's name in errors.

    Raises:
        ArgumentError: no value can be written as text, or the schema cannot be enforced.
    """
    schema = schema if isinstance(schema, Mapping) else {}
    options = list(_options(schema, definitions, ()))
    others = types - {"string"}
    literals = _python_words(options, others)
    lines: list[str] = []
    alternatives: list[str] = []
    if types == others and types:
        data = schema
    else:
        for option in options:
            if "allOf" in option:
                raise ArgumentError(
                    f"{where} combines schemas of a string, which cannot be enforced in a call; merge them"
                )
            if "enum" in option or "const" in option:
                literals += [value for value in _values(option) if isinstance(value, str)]
            elif not types_of(option) or "string" in types_of(option):
                terminal = f"{name.upper()}S{len(lines)}"
                lines.append(f"{terminal}: ({_string(option, others, where)}) {quoted(END)}")
                alternatives.append(terminal)
        data = {"anyOf": [part for option in options if (part := _without_strings(option))]}
    kept = [text for text in dict.fromkeys(literals) if _reads_back(text, text, types) or text in _WORDS]
    alternatives += [quoted(text + END) for text in kept]
    if others:
        lines.append(f"{name}j: {json_rule({**definitions, **data}, where, in_call=True)}")
        alternatives.append(f"{name}j {quoted(END)}")
    if not alternatives:
        raise ArgumentError(f"{where} allows no value that can be written as text; change its schema")
    return "\n".join([f"{name}: {' | '.join(alternatives)}", *lines])


def _options(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], seen: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Yields alternatives of a schema with at most one type each. Combinations of schemas are not split."""
    combined = [key for key in ("anyOf", "oneOf", "allOf", "$ref") if key in schema]
    if not combined:
        names = sorted(types_of(schema))
        yield from ({**schema, "type": name} for name in names) if names else [dict(schema)]
    elif intersects(schema):
        yield {"allOf": [schema]}
    elif combined == ["$ref"]:
        if (reference := str(schema["$ref"])) not in seen:
            target: Any = definitions
            for step in reference.removeprefix("#/").split("/"):
                target = target.get(step) if isinstance(target, Mapping) else None
            if not isinstance(target, Mapping):
                raise ArgumentError(f"found no {reference!r} in the schema, expected a definition; add it")
            yield from _options(target, definitions, (*seen, reference))
    else:
        for part in schema[combined[0]]:
            yield from _options(part if isinstance(part, Mapping) else {}, definitions, seen)


def _values(option: Mapping[str, Any]) -> list[Any]:
    return [option["const"]] if "const" in option else list(option["enum"])


def _without_strings(option: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the schema without the type string; None if no type remains."""
    if "enum" in option or "const" in option:
        values = [value for value in _values(option) if not isinstance(value, str)]
        return {"enum": values} if values else None
    return dict(option) if types_of(option) - {"string"} else None


def _python_words(options: list[dict[str, Any]], types: frozenset[str]) -> list[str]:
    """Returns the Python literals among the values, which chat templates write and the parser of calls reads."""
    return [
        word
        for word, (kind, value) in _WORDS.items()
        if kind in types
        and any(
            any(v is value for v in _values(option))
            if "enum" in option or "const" in option
            else kind in types_of(option)
            for option in options
        )
    ]


def _reads_back(text: str, value: Any, types: frozenset[str]) -> bool:
    """Returns whether the parser of calls reads ``text`` as ``value``, and no part of the text ends the call."""
    try:
        return not has_tag(text) and bool(from_text(text, types, "") == value)
    except ToolCallError:
        return False


def _string(option: Mapping[str, Any], others: frozenset[str], where: str) -> str:
    """Returns a terminal for strings. If other types are allowed too, it excludes texts that read as another type."""
    unsupported = {"contentEncoding", "contentMediaType"} & set(option)
    if unsupported:
        raise ArgumentError(f"{where} has the keyword {unsupported.pop()!r}, which no grammar enforces; remove it")
    low, large = option.get("minLength", 0), "pattern" in option or "format" in option
    high = option.get("maxLength", max(low, MAX_IN_CALL if large else MAX_CHARACTERS))
    parts = [regex(tagless_beside(others, high) if others else tagless(high))]
    if low or "maxLength" in option:
        parts.append(regex(f"(?s:.{{{low},{high}}})"))
    if "pattern" in option:
        parts.append(regex(_searched(option["pattern"])))
    if "format" in option:
        if option["format"] not in _FORMATS:
            raise ArgumentError(
                f"{where} has the format {option['format']!r}, expected one of {', '.join(sorted(_FORMATS))}; "
                "use one of these, or a pattern"
            )
        parts.append(regex(f"(?:{_FORMATS[option['format']]})"))
    terminal = " & ".join(parts)
    if len(parts) > 1 and is_empty(terminal):
        raise ArgumentError(
            f"{where} allows no string in a call, expected one without tags of a call and of a length that its pattern "
            "or format has; change its schema"
        )
    return terminal


def _searched(pattern: str) -> str:
    """Returns a pattern for whole texts that contain a match of the given pattern. With alternatives, it may match
    fewer texts.
    """
    head, tail = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", pattern)
    body = pattern[head : len(pattern) - 1 if tail else None]
    return f"{'' if head else '(?s:.*)'}(?:{body}){'' if tail else '(?s:.*)'}"
