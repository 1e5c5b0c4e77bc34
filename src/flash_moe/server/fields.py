"""Common parts of the request bodies of all protocols."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .failures import Refusal

_EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
Text = Annotated[str, Field(max_length=8_000_000)]


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("finite", "found NaN or an infinite number, which JSON does not have") from None
    return value


Json = Annotated[dict[str, Any], AfterValidator(_finite)]


class Body(BaseModel):
    """A JSON object. An unknown field is an error, so that no field is ignored silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(BaseModel):
    """A JSON object in which unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(Lenient):
    """A piece of text in a message. Fields such as ``cache_control`` and ``annotations`` do not change a reply."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


def text_of(content: str | list[TextPart] | None) -> str:
    """Returns the text of a message's content, which is a string or a list of parts."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def json_format(schema: Json) -> Json:
    """Returns the option ``response_format`` of the library for a JSON schema, whatever its type is."""
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def tool_options(tools: list[Json], strict: bool, choice: str | None, name: str | None) -> Json:
    """Returns the options of :meth:`Model.stream` for tools.

    Args:
        tools: the tools in OpenAI's form.
        strict: whether a tool asks for calls that fit its schema; then those of all tools must be enforced.
        choice: ``"auto"``, ``"none"`` or ``"required"``; None if the body does not say.
        name: the name of the function that must be called; None if there is none.

    Raises:
        Refusal: a call is required, but there are no tools; or the library cannot force a function of this name.
    """
    options: Json = {}
    if tools:
        options["tools"] = tools
        if strict:
            options["strict_tools"] = True
    if (choice == "required" or name is not None) and not tools:
        raise Refusal(400, "tool_choice needs tools", "tool_choice")
    if name in ("auto", "none", "required"):
        raise Refusal(400, f"tool_choice cannot force a function called {name!r}; rename it", "tool_choice")
    if name is not None or choice is not None:
        options["tool_choice"] = choice if name is None else name
    return options


def thinking_options(effort: str | None, budget: int | None, enabled: bool | None) -> Json:
    """Returns ``enable_thinking`` and ``reasoning_budget`` for an effort, or for explicit values."""
    options: Json = {}
    if effort is not None:
        limit = _EFFORTS[effort]
        options["enable_thinking"] = limit != 0
        if limit:
            options["reasoning_budget"] = limit
    if budget is not None:
        options["reasoning_budget"] = budget
    if enabled is not None:
        options["enable_thinking"] = enabled
    if options.get("enable_thinking") is False:
        options.pop("reasoning_budget", None)
    return options
