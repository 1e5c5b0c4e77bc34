"""Request bodies of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

Source: Anthropic's API reference (November 2026).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .failures import Refusal
from .fields import (
    Body,
    Count,
    Json,
    Lenient,
    Stop,
    Text,
    TextPart,
    TopP,
    json_format,
    text_of,
    thinking_options,
    tool_options,
)


class ToolUse(Lenient):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ToolResult(Lenient):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Text | list[TextPart] | None = None
    is_error: bool | None = None


class Thinking(Lenient):
    type: Literal["thinking"]
    thinking: Text


class RedactedThinking(Lenient):
    type: Literal["redacted_thinking"]


def _type_of(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if isinstance(kind, str) else ""


Block = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ToolResult, Tag("tool_result")]
    | Annotated[Thinking, Tag("thinking")]
    | Annotated[RedactedThinking, Tag("redacted_thinking")],
    Discriminator(_type_of),
]


class Message(Lenient):
    role: Literal["user", "assistant"]
    content: Text | list[Block]

    def for_library(self) -> list[Json]:
        """Returns the message as chat messages of the library. Each tool result becomes a separate message."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        messages: list[Json] = []
        message: Json = {"role": self.role, "content": ""}
        for block in self.content:
            if isinstance(block, ToolResult):
                text = text_of(block.content)
                if block.is_error:
                    text = json.dumps({"error": text}, ensure_ascii=False)
                messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
            elif isinstance(block, ToolUse):
                call = {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
                message.setdefault("tool_calls", []).append(call)
            elif isinstance(block, Thinking):
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            elif isinstance(block, TextPart):
                message["content"] += block.text
        if len(message) > 2 or message["content"] or not messages:
            messages.append(message)
        return messages


class Tool(Lenient):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: Json
    strict: bool | None = None

    def for_library(self) -> Json:
        """Returns the tool in OpenAI's form, which the library accepts."""
        function: Json = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    json_schema: Json = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(Body):
    """The fields that determine the prompt. They are the whole body of `count_tokens`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: Text | list[TextPart] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    # These fields do not change a reply.
    cache_control: Json | None = None
    context_management: Json | None = None

    def prompt(self) -> list[Json]:
        """Returns the messages as chat messages of the library."""
        system = text_of(self.system)
        messages: list[Json] = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += message.for_library()
        return messages[:-1] if _prefill(messages[-1]) else messages

    def options(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the fields of the body.

        Raises:
            Refusal: some fields contradict each other.
        """
        tools, choice = self.tools or [], self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name is None:
            raise Refusal(400, "tool_choice of type tool needs a name", "tool_choice.name")
        options = tool_options(
            [tool.for_library() for tool in tools],
            any(tool.strict for tool in tools),
            None if choice is None else _CHOICES.get(choice.type),
            choice.name if choice is not None and choice.type == "tool" else None,
        )
        if (config := self.output_config) is not None:
            options |= thinking_options(config.effort, None, None)
            if config.format is not None:
                options["response_format"] = json_format(config.format.json_schema)
        if self.thinking is not None:
            options["enable_thinking"] = self.thinking.type != "disabled"
            if self.thinking.type == "enabled" and self.thinking.budget_tokens is not None:
                options["reasoning_budget"] = self.thinking.budget_tokens
        if prefill := _prefill(self.messages[-1].for_library()[-1]):
            options["prefill"] = prefill
        return options

    @property
    def one_call(self) -> bool:
        """Whether the reply may contain at most one tool call."""
        return self.tool_choice is not None and bool(self.tool_choice.disable_parallel_tool_use)


class MessagesBody(PromptBody):
    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    stop_sequences: Stop | None = None
    stream: bool | None = None
    # These fields do not change a reply.
    metadata: Json | None = None
    service_tier: str | None = None

    def options(self) -> Json:
        """Returns the options of :meth:`Model.stream` for the fields of the body."""
        options = super().options() | {"max_tokens": self.max_tokens}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.stop_sequences:
            options["stop"] = self.stop_sequences
        return options


def _prefill(message: Json) -> str:
    """Returns the text that the reply must begin with, if the last message is an assistant message."""
    return message["content"] if message["role"] == "assistant" and "tool_calls" not in message else ""


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
