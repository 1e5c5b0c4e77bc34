"""The request body of OpenAI's `/v1/responses`, and its conversion to arguments of the library.

It supports the fields that current agents send: text, function tools, reasoning, enforced formats. The server stores no
responses, so a client sends the whole conversation each time (``store`` false). Source: OpenAI's API reference
(November 2026).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .failures import Refusal
from .fields import (
    Body,
    Count,
    Json,
    Lenient,
    Temperature,
    Text,
    TextPart,
    TopP,
    json_format,
    text_of,
    thinking_options,
    tool_options,
)


class InputMessage(Lenient):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class FunctionCall(Lenient):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Lenient):
    type: Literal["function_call_output"]
    call_id: str
    output: Text | list[TextPart]


class ReasoningText(Lenient):
    text: Text


class ReasoningItem(Lenient):
    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None


def _type_of(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else ""


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None

    def for_library(self) -> Json:
        """Returns the tool in the form that the library accepts."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type", "strict"})}


class NamedTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesBody(Body):
    model: str
    input: Text | Annotated[list[Item], Field(min_length=1)]
    instructions: Text | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    # These fields do not change a reply.
    store: bool | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    metadata: Json | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    client_metadata: Json | None = None

    def prompt(self) -> list[Json]:
        """Returns the input as chat messages of the library."""
        messages: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        reply: Json | None = None  # the items of one turn of the model form one message

        def turn() -> Json:
            nonlocal reply
            if reply is None:
                reply = {"role": "assistant", "content": ""}
                messages.append(reply)
            return reply

        for item in self.input:
            if isinstance(item, FunctionCall):
                function = {"name": item.name, "arguments": item.arguments}
                calls = turn().setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            elif isinstance(item, ReasoningItem):
                parts = item.content or item.summary or []
                turn()["reasoning_content"] = "".join(part.text for part in parts)
            elif isinstance(item, FunctionCallOutput):
                reply = None
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
            elif item.role == "assistant":
                turn()["content"] += text_of(item.content)
            else:
                reply = None
                role = "user" if item.role == "user" else "system"
                messages.append({"role": role, "content": text_of(item.content)})
        return messages

    def options(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the fields of the body.

        Raises:
            Refusal: some fields contradict each other.
        """
        options: Json = {} if self.reasoning is None else thinking_options(self.reasoning.effort, None, None)
        for name, value in (
            ("max_tokens", self.max_output_tokens), ("temperature", self.temperature), ("top_p", self.top_p),
        ):  # fmt: skip
            if value is not None:
                options[name] = value
        tools, choice = self.tools or [], self.tool_choice
        options |= tool_options(
            [tool.for_library() for tool in tools],
            any(tool.strict for tool in tools),
            None if isinstance(choice, NamedTool) else choice,
            choice.name if isinstance(choice, NamedTool) else None,
        )
        wanted = None if self.text is None else self.text.format
        if wanted is not None and wanted.type == "json_object":
            options["response_format"] = "json"
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise Refusal(400, "text.format of type json_schema needs a schema", "text.format.schema")
            options["response_format"] = json_format(wanted.json_schema)
        return options
