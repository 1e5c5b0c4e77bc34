"""The formats of ``response_format=``: their grammars, and the parsing of replies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import ArgumentError, FormatError
from ..text.reply import THINK
from .lark import json_rule, quoted, regex
from .matcher import is_empty
from .schema import MAX_CHARACTERS, reaches_bound, subschemas
from .wellformed import check_schema

Specification: TypeAlias = type | Mapping[str, Any] | str | re.Pattern[str] | Sequence[str]
_EXPECTED = "a pydantic class, a JSON schema, 'json', a compiled regular expression or a list of strings"
_FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s"}


@dataclass(frozen=True)
class ResponseFormat:
    """The format of a reply.

    Attributes:
        kind: ``"json"``, ``"regex"`` or ``"choices"``.
        rules: lines of a grammar that define a rule ``value``.
        parse: function that parses the text of a reply.
    """

    kind: str
    rules: tuple[str, ...]
    parse: Callable[[str], Any]


def response_format(wanted: Specification | None) -> ResponseFormat | None:
    """Returns the format that `wanted` describes; None for any text.

    Args:
        wanted: a pydantic class or another type that pydantic knows; a JSON schema, bare or wrapped as in OpenAI's API;
            ``"json"`` (any object); a regular expression that must match the whole text; or a list of choices.

    Raises:
        ArgumentError: `wanted` is none of these, or cannot be enforced.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        if wanted != "json":
            raise ArgumentError(f"response_format is {wanted!r}, expected {_EXPECTED}")
        return _data({"type": "object"}, json.loads)
    if isinstance(wanted, re.Pattern):
        return _matching(wanted)
    if isinstance(wanted, Mapping):
        return _wrapped(wanted)
    if isinstance(wanted, (list, tuple)):
        return _choice(wanted)
    return _typed(wanted)


def _data(schema: Mapping[str, Any], parse: Callable[[str], Any]) -> ResponseFormat:
    check_schema(schema, "response_format")

    def complete(text: str) -> Any:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FormatError(f"the reply is not complete JSON ({error}); a stop string may have cut it") from error
        if reaches_bound(data):
            raise FormatError(
                "a string or an array of the reply was ended where its length reached the bound of those without a "
                "maxLength or maxItems; give the schema one"
            )
        return parse(text)

    return ResponseFormat("json", (f"value: {json_rule(schema, 'response_format')}",), complete)


def _wrapped(wanted: Mapping[str, Any]) -> ResponseFormat | None:
    if wanted == {"type": "text"}:
        return None
    if wanted == {"type": "json_object"}:
        return response_format("json")
    if wanted.get("type") != "json_schema":
        return _data(wanted, json.loads)
    inner = wanted.get("json_schema", wanted)  # in the Responses API, the schema is beside the type
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ArgumentError(f"response_format is {wanted!r:.200}, expected json_schema.schema to be a JSON schema")
    return _data(schema, json.loads)


def _typed(wanted: Any) -> ResponseFormat:
    try:
        from pydantic import TypeAdapter, ValidationError
        from pydantic.errors import PydanticUserError
    except ImportError as error:
        raise ArgumentError(f"response_format is {wanted!r:.80}, which needs pydantic: pip install pydantic") from error
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(wanted)
        schema = adapter.json_schema()
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"response_format is {wanted!r:.80}, expected {_EXPECTED} ({reason})") from error
    for part in subschemas(schema):
        if isinstance(part, dict):
            part.pop("uniqueItems", None)  # the class makes sets of any list, so uniqueItems need not be enforced

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(text)
        except ValidationError as error:
            raise FormatError(
                f"{getattr(wanted, '__name__', wanted)} refuses the reply, though it fits its JSON schema: {error}; the "
                "reply's text is kept"
            ) from error

    return _data(schema, parse)


def _matching(pattern: re.Pattern[str]) -> ResponseFormat:
    if not isinstance(pattern.pattern, str):
        raise ArgumentError("response_format is a pattern of bytes, expected one of text")
    if pattern.flags & re.VERBOSE:
        raise ArgumentError(
            "response_format is a pattern with re.VERBOSE, which cannot be enforced; write it without spaces"
        )
    flags = "".join(letter for flag, letter in _FLAGS.items() if pattern.flags & flag)
    whole = regex(f"(?{flags}:{pattern.pattern})" if flags else f"(?:{pattern.pattern})")

    def parse(text: str) -> re.Match[str]:
        if (match := pattern.fullmatch(text)) is None:
            raise FormatError(
                f"{text!r:.200} does not match {pattern.pattern!r}, though llguidance's dialect of it does"
            )
        return match

    bound, reasoning = f"(?s:.{{0,{MAX_CHARACTERS}}})", rf"\s*{THINK}(?s:.*)"
    answer = f"{whole} & ~{regex(reasoning)}"
    if is_empty(answer):
        raise ArgumentError(
            f"response_format is {pattern.pattern!r:.200}, which matches no text that can be a reply; text that begins "
            f"with {THINK} is read as reasoning"
        )
    return ResponseFormat("regex", (f"value: WHOLE\nWHOLE: {answer} & {regex(bound)}",), parse)


def _choice(choices: Sequence[Any]) -> ResponseFormat:
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ArgumentError(f"response_format is {choices!r:.200}, expected a list of strings that are not empty")
    if reasons := [choice for choice in choices if choice.lstrip().startswith(THINK)]:
        raise ArgumentError(f"the choice {reasons[0]!r:.80} begins with {THINK}, which is read as reasoning; rename it")

    def parse(text: str) -> str:
        if text not in choices:
            raise FormatError(f"{text!r:.200} is none of the choices {choices!r:.200}")
        return text

    return ResponseFormat("choices", (f"value: {' | '.join(map(quoted, dict.fromkeys(choices)))}",), parse)
