"""Request bodies of OpenAI's `/v1/chat/completions` and `/v1/completions`.

Source: OpenAI's API reference (November 2026). The additional fields (``top_k``, ``min_p``, ``repetition_penalty``,
``enable_thinking``, ``reasoning_budget``, ``chat_template_kwargs``, ``reasoning_content``) have the names of vLLM and
llama.cpp's server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .failures import Refusal
from .fields import (
    Body,
    Count,
    Json,
    Lenient,
    Penalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TextPart,
    TopP,
    json_format,
    thinking_options,
    tool_options,
)


class FunctionCall(Lenient):
    name: str
    arguments: str


class Call(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def for_library(self) -> Json:
        """Returns the message for the chat template, without fields that are null."""
        message = self.model_dump(exclude_none=True, exclude={"annotations", "refusal"})
        message.setdefault("content", "")
        if message["role"] == "developer":
            message["role"] = "system"
        return message


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    json_schema: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Body):
    """The fields that both endpoints share."""

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    # These fields do not change a reply.
    user: str | None = None
    metadata: Json | None = None

    def sampling(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the shared fields."""
        options: Json = {
            name: getattr(self, name)
            for name in (
                "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop",
            )
        }  # fmt: skip
        options["top_k"] = 0 if self.top_k == -1 else self.top_k
        if self.logit_bias:
            options["logit_bias"] = {_token(key): bias for key, bias in self.logit_bias.items()}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    reasoning_budget: Annotated[int, Field(ge=0)] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Json | None = None
    # These fields do not change a reply.
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    modalities: list[Literal["text"]] | None = None

    def options(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the fields of the body.

        Raises:
            Refusal: some fields contradict each other.
        """
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        options = self.sampling() | thinking_options(self.reasoning_effort, self.reasoning_budget, self.enable_thinking)
        if limit := self.max_completion_tokens or self.max_tokens:
            options["max_tokens"] = limit
        tools, choice = self.tools or [], self.tool_choice
        options |= tool_options(
            [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools],
            any(tool.function.strict for tool in tools),
            None if isinstance(choice, NamedTool) else choice,
            choice.function.name if isinstance(choice, NamedTool) else None,
        )
        if self.response_format is not None:
            options |= format_options(self.response_format)
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        if self.chat_template_kwargs:
            variables = dict(self.chat_template_kwargs)
            if "enable_thinking" in variables:
                options["enable_thinking"] = variables.pop("enable_thinking")
            if variables:
                options["template_variables"] = variables
        return options


class CompletionBody(Generation):
    prompt: Text | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def text(self) -> str | list[int]:
        """Returns the prompt; a list must contain exactly one."""
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]

    def options(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the fields of the body."""
        options = self.sampling() | {"raw": True, "max_tokens": self.max_tokens or 16}
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        return options


def format_options(wanted: ResponseFormat) -> Json:
    """Returns the option ``response_format`` of the library.

    Raises:
        Refusal: the type is ``json_schema``, but the schema is missing.
    """
    if wanted.type == "json_object":
        return {"response_format": "json"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.json_schema is None:
            raise Refusal(400, "response_format of type json_schema needs json_schema.schema", "response_format")
        return {"response_format": json_format(wanted.json_schema.json_schema)}
    return {}


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise Refusal(400, f"logit_bias: {key[:40]!r} is not a token id", "logit_bias")
    return int(key)
