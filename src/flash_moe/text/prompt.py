"""Converts the prompt of a user to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from ..checks import shown
from ..errors import PromptError
from .reply import REASONING_CLOSED, THINK
from .tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]
Prompts = list[str] | list[list[dict[str, Any]]] | list[list[int]]


def several(prompt: object) -> TypeGuard[Prompts]:
    """Returns whether a value is a list of prompts, as opposed to a list of messages or token ids."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(one, (str, list)) for one in prompt)


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    variables: Mapping[str, Any] | None = None,
    prefill: str = "",
    raw: bool = False,
) -> list[int]:
    """Returns the token ids of a string, a list of chat messages, or a list of token ids.

    Args:
        vocab_size: number of ids of the model; may exceed that of the tokenizer.
        tools, enable_thinking, variables: variables for the chat template.
        prefill: text that the reply begins with.
        raw: whether a string is text to continue, even if there is a chat template.

    Raises:
        PromptError: the prompt is empty, has an unknown type, or contains a token id outside the vocabulary.
        TokenizerError: the messages do not fit the chat template.
    """
    prompt = _listed(prompt)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        kind = type(prompt).__name__
        raise PromptError(f"the prompt is of type {kind}, expected a string, chat messages or token ids")
    if not prompt:
        raise PromptError("the prompt is empty; pass some text, messages or token ids")
    if not isinstance(prefill, str):
        raise PromptError(f"prefill is {shown(prefill)}, expected a string")
    if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
        tokens = check_tokens(prompt, vocab_size)
        return tokens + check_tokens(tokenizer.encode(prefill), vocab_size) if prefill else tokens
    if isinstance(prompt, str) and (raw or tokenizer.chat_template is None):
        return check_tokens(tokenizer.encode(prompt + prefill), vocab_size)
    messages: Sequence[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if clash := sorted({"messages", "tools", "add_generation_prompt", "enable_thinking"} & set(variables or ())):
        raise PromptError(f"template_variables holds {clash[0]!r}, which is set otherwise; leave it out there")
    text = tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=enable_thinking, **(variables or {}))
    return check_tokens(tokenizer.encode(continued(text, prefill)), vocab_size)


def continued(text: str, prefill: str) -> str:
    """Returns the text of a prompt with the beginning of the reply.

    If reasoning is open, its end tag is added first.
    """
    if prefill and text.rstrip().endswith(THINK):
        if prefill.startswith(THINK):
            return text.rstrip().removesuffix(THINK) + prefill
        return text + REASONING_CLOSED + prefill
    return text + prefill


def check_tokens(tokens: Sequence[Any], vocab_size: int) -> list[int]:
    """Returns the ids as plain integers.

    Raises:
        PromptError: there are no ids, or an id is not in the vocabulary.
    """
    tokens = _listed(tokens)
    if not isinstance(tokens, Sequence) or not len(tokens):
        raise PromptError("the prompt holds no tokens; pass some text")
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise PromptError(
                f"element {position} of the prompt is {shown(token)}, expected a token id or a chat message"
            )
        if not 0 <= int(token) < vocab_size:
            raise PromptError(f"token id {int(token)} at position {position} is outside the vocabulary of {vocab_size}")
    return [int(token) for token in tokens]


def _listed(tokens: Any) -> Any:
    """Converts arrays of NumPy, MLX and others to lists."""
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens


def check_sequences(sequences: Sequence[Sequence[int]], vocab_size: int, context: int) -> list[list[int]]:
    """Checks sequences of ids and returns them as plain integers.

    Args:
        context: maximum number of tokens of a sequence.

    Raises:
        PromptError: a sequence is empty or too long, or contains an id outside the vocabulary.
    """
    for number, sequence in enumerate(sequences, start=1):
        if len(sequence) > context:
            raise PromptError(
                f"sequence {number} has {len(sequence)} tokens, the model's context is {context}; shorten it"
            )
    return [check_tokens(sequence, vocab_size) for sequence in sequences]
