"""Generates greedy replies; a single pass recognises an expected reply without decoding it.

Greedy decoding gives a text if, and only if, each of its tokens is the most probable one after the tokens before it,
including the end of the reply. A single pass over prompt and text checks this many times faster than decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import TokenizerError
from ..model import Model
from ..text import Tokenizer
from .tool_call_score import Reply, ToolCallCase


@dataclass(frozen=True)
class Recognized:
    """A reply that equals the expected one."""

    raw_text: str
    finish_reason: str = "stop"


def greedy(
    model: Model, max_tokens: int, enable_thinking: bool | None = None, strict_tools: bool = False
) -> Callable[[ToolCallCase], Reply]:
    """Returns a function that generates greedy replies of a model.

    If a reply differs from the expected calls as the chat template writes them, even only in the order of arguments, it
    is decoded. If streaming options act on single tokens, all replies are decoded. Two tokens with equal probabilities
    up to rounding may be swapped between a pass and decoding.

    Args:
        enable_thinking: value for the chat template if a case does not set it.
        strict_tools: whether to enforce the schemas of tools.
    """

    def reply(case: ToolCallCase) -> Reply:
        thinking = enable_thinking if case.enable_thinking is None else case.enable_thinking
        template: dict[str, Any] = {"tools": case.tools, "enable_thinking": thinking}
        prompt = model.encode(case.messages, **template)
        expected = [] if model.streaming.changes_experts else expected_reply(model.tokenizer, case, template)
        room = min(max_tokens, model.config.max_position_embeddings - len(prompt))
        if 0 < len(expected) <= room and _is_likeliest(model, prompt, expected):
            return Recognized(model.tokenizer.decode(expected[:-1], skip_special_tokens=True))
        return model.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=0,
            repetition_penalty=1,
            tools=case.tools,
            strict_tools=strict_tools,
            progress=False,
        )

    return reply


def expected_reply(tokenizer: Tokenizer, case: ToolCallCase, template: dict[str, Any]) -> list[int]:
    """Returns the tokens of a reply with exactly the calls of a case, including the token that ends it.

    Args:
        template: further variables of the chat template.

    Returns:
        The tokens; empty if the case has no calls, or the template does not write calls directly after the prompt.
    """
    if not case.calls:
        return []
    calls = [{"type": "function", "function": call} for call in case.calls]
    messages = [*case.messages, {"role": "assistant", "content": "", "tool_calls": calls}]
    prompt = tokenizer.apply_chat_template(case.messages, **template)
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **template)
    except TokenizerError:  # a template may not support calls
        return []
    tokens = tokenizer.encode(text[len(prompt) :]) if text.startswith(prompt) else []
    ends = [i for i, token in enumerate(tokens, start=1) if token in tokenizer.eos_token_ids]
    return tokens[: ends[0]] if ends else []


def _is_likeliest(model: Model, prompt: list[int], reply: list[int]) -> bool:
    logits = model.logits([*prompt, *reply[:-1]], last=len(reply))
    return mx.argmax(logits, axis=-1).tolist() == reply
