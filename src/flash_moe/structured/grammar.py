"""Builds the grammar of a whole reply from its tools and its format.

If the request has tools, a reply is free text, followed by calls. A call names a declared function and has declared
parameters in any order: all required ones, and none twice. Values fit their schemas, and the closing tags are complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import ArgumentError
from ..text.tool_schemas import functions
from .lark import HEADER, json_rule, quoted, regex, token
from .parameters import alternatives, with_definitions
from .response_formats import ResponseFormat
from .text_values import value_rule
from .wellformed import check_schema

CallForm = Literal["text", "json"]
_MAX_UNORDERED = 64  # bits of a rule's parameter; with more parameters than bits, the declared order is enforced
_MAX_PREAMBLE = 1024  # maximum number of characters before a required call
_TEXT = r"TEXT: {} & ~/(?s:.*)(<\/?tool_call>|<function=)(?s:.*)/"
_NAME_ENDS = frozenset("<>\n")


def reply_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    form: CallForm,
    tags: tuple[int, int] | None,
    format: ResponseFormat | None,
) -> str:
    """Returns the grammar of the part of a reply after its reasoning.

    Args:
        tools: schemas of the functions, as for chat templates.
        choice: ``"auto"`` (text, calls, or text and calls), ``"required"`` (calls, possibly after a short text), or the
            name of a function that is called exactly once.
        form: the form in which the model writes calls.
        tags: ids of ``<tool_call>`` and ``</tool_call>``; may be None only if there are no tools.
        format: format of the text if the reply calls no tool.

    Raises:
        ArgumentError: a tool's schema is malformed or cannot be enforced, or no tool has the chosen name.
    """
    if not tools:
        assert format is not None, "nothing to enforce"
        return "\n".join([HEADER, "start: value", *format.rules])
    assert tags is not None, "calls need their tokens"
    named = choice not in ("auto", "required")
    if named:
        names = [_function(tool)["name"] for tool in tools]
        if choice not in names:
            raise ArgumentError(f"tool_choice is {choice!r}, expected 'auto', 'none', 'required' or one of {names}")
        tools = [tool for tool, name in zip(tools, names, strict=True) if name == choice]
    rules, calls = _calls_grammar(tools, form, tags)
    if named:
        start = "call"
    elif choice == "required":
        start = f"TEXT? {calls}"
    elif format is not None:
        start = f"{calls} | value"
    else:
        start = f"TEXT {calls}?"
    text = [_text(choice == "required")] if "TEXT" in start else []
    values = list(format.rules) if "value" in start and format is not None else []
    return "\n".join([HEADER, f"start: {start}", *rules, *text, *values])


def _calls_grammar(tools: Sequence[Mapping[str, Any]], form: CallForm, tags: tuple[int, int]) -> tuple[list[str], str]:
    """Returns grammar rules, and the name of the rule for one or more calls.

    Args:
        tools: JSON schemas of functions, as for chat templates.
        form: ``"text"`` (``<function=NAME>``: Qwen3.5, Qwen3-Coder) or ``"json"`` (Qwen3-Next).
        tags: ids of the tokens ``<tool_call>`` and ``</tool_call>``.

    Raises:
        ArgumentError: a schema is malformed or cannot be enforced.
    """
    offered = [_function(tool) for tool in tools]
    parsed = [(f, _parameters(f)) for f in offered]
    split = [(f["name"], option, schema) for f, schema in parsed for option in alternatives(schema, f["name"])]
    rules = [(_text_rule if form == "text" else _json_rule)(i, *part) for i, part in enumerate(split)]
    head, tail = (r"\n<function=", r"</function>\n") if form == "text" else (r"\n", r"\n")
    names = " | ".join(f"f{i}" for i in range(len(rules)))
    call = f'call: {token(tags[0])} "{head}" ({names}) "{tail}" {token(tags[1])}'
    return [r'calls: call ("\n" call)*', call, *rules], "calls"


def _text(required: bool) -> str:
    """Returns the terminal TEXT for the text before calls. It is short if a call is required."""
    return _TEXT.format(regex(f"(?s:.{{0,{_MAX_PREAMBLE}}})" if required else "(?s:.*)"))


def _function(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
        raise ArgumentError(f"a tool is {tool!r:.200}, expected a function's JSON schema with a name")
    _check_name(name, "a tool")
    return function


def _check_name(name: str, what: str) -> None:
    """Raises ArgumentError if the parser of calls cannot read a name."""
    if _NAME_ENDS & set(name) or name != name.strip():
        raise ArgumentError(
            f"{what} is called {name!r}, expected a name without '<', '>', line breaks and spaces at its ends; rename it"
        )


def _text_rule(i: int, name: str, option: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Returns the rule ``f{i}`` of a call.

    Args:
        option: schema of the parameters in this call, one of the alternatives of `schema`.
        schema: schema of the parameters in all calls of the function.
    """
    own, reads = (functions([{"name": name, "parameters": part}])[name] for part in (option, schema))
    properties, required = dict(option.get("properties") or {}), list(own.required)
    names = required + [key for key in properties if key not in required]
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    lines = []
    for n, key in enumerate(names):
        _check_name(key, f"a parameter of {name}")
        if not own.takes(key):
            raise ArgumentError(f"{name} requires {key!r}, which its schema does not allow; declare it in properties")
        others = option.get("additionalProperties", {})
        value = value_rule(properties.get(key, others), reads.types_of(key), definitions, f"f{i}v{n}", f"{name}.{key}")
        lines += [f"f{i}p{n}: {quoted(f'<parameter={key}>' + chr(10))} f{i}v{n}", value]
    _check_patterns(name, option, names)
    low, high = max(option.get("minProperties", 0), len(required)), option.get("maxProperties", len(names))
    if low > min(high, len(names)):
        raise ArgumentError(
            f"{name} takes at least {low} and at most {min(high, len(names))} parameters; change the bounds, or declare "
            "more properties, because calls contain only declared ones"
        )
    bounded = low > len(required) or high < len(names)
    head = f"f{i}: {quoted(name + '>' + chr(10))}"
    if not 0 < len(names) <= _MAX_UNORDERED:
        if bounded:
            raise ArgumentError(f"{name} bounds the number of its {len(names)} parameters; declare at most 64")
        ordered = " ".join(f"f{i}p{n}" + "?" * (n >= len(required)) for n in range(len(names)))
        return "\n".join([f"{head} {ordered}", *lines])
    complete = f"is_ones([0:{len(required)}])" if required else "true"
    if low > len(required):
        complete = f"and({complete}, bit_count_ge(_, {low}))"
    # An optional parameter is allowed only if the required ones still have room.
    room = f", bit_count_lt([{len(required)}:{len(names)}], {high - len(required)}))" if high < len(names) else ""
    free = [
        f"and(bit_clear({n}){room}" if room and n >= len(required) else f"bit_clear({n})" for n in range(len(names))
    ]
    rest = "".join(f"\n  | f{i}p{n} f{i}a::set_bit({n}) %if {condition}" for n, condition in enumerate(free))
    return "\n".join([f"{head} f{i}a::0", f'f{i}a::_: "" %if {complete}{rest}', *lines])


def _check_patterns(name: str, option: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raises ArgumentError if a declared parameter must also fit a schema of ``patternProperties``."""
    for pattern in option.get("patternProperties", ()):
        try:
            found = [key for key in keys if re.search(pattern, key)]
        except re.error as error:
            raise ArgumentError(f"{name} has the pattern {pattern!r}, which is malformed ({error})") from error
        if found:
            raise ArgumentError(
                f"{name}.{found[0]} must also fit the patternProperties {pattern!r}; declare it only once"
            )


def _json_rule(i: int, name: str, option: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Returns the rule ``f{i}`` of a call in JSON; the arguments are those of :func:`_text_rule`."""
    call = {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {**option, "type": "object"}},
        "required": ["name", "arguments"],
        **{key: schema[key] for key in ("$defs",) if key in schema},
    }
    return f"f{i}: {json_rule(call, name)}"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    name = function["name"]
    parameters = function.get("parameters") or {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise ArgumentError(f"parameters of {name} are {parameters!r:.80}, expected a JSON schema")
    check_schema(parameters, name)
    return with_definitions(parameters, name)
