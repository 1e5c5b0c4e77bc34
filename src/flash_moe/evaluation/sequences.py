"""Reads texts as sequences of tokens: conversations in their chat template, or windows of plain text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, TokenizerError
from ..text import Tokenizer
from .json_lines import read_lines, read_text

WINDOW = 2048  # tokens


@dataclass(frozen=True)
class TokenSequence:
    """A sequence of tokens that a model runs from an empty cache.

    Attributes:
        tokens: T token ids.
        assistant: T flags, whether the assistant wrote the token.
    """

    tokens: tuple[int, ...]
    assistant: tuple[bool, ...]


def read_sequences(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    window: int = WINDOW,
    limit: int | None = None,
    enable_thinking: bool | None = None,
) -> list[TokenSequence]:
    """Reads a ``.jsonl`` file as conversations, and any other file as plain text.

    A line of a conversation file is ``{"messages": [...], "tools": [...], "enable_thinking": true}``, the last two
    optional.

    Args:
        window: tokens per sequence of a plain text. A shorter rest is used only if it is the whole text.
        limit: maximum number of sequences.
        enable_thinking: value for the chat template if a line does not set it.

    Raises:
        ArgumentError: the file is malformed or empty.
        TokenizerError: there is no chat template, or messages do not fit it.
        OSError: the file cannot be read.
    """
    file = Path(path)
    if window < 2 or (limit is not None and limit < 1):
        raise ArgumentError(f"window is {window} and limit {limit}, expected at least 2 tokens and 1 sequence")
    if file.suffix != ".jsonl":
        sequences = windows(tokenizer.encode(read_text(file)), window)[:limit]
    else:
        sequences = []
        for line in read_lines(file, limit):
            flag = line.flag("enable_thinking")
            thinking = enable_thinking if flag is None else flag
            try:
                sequences.append(conversation(tokenizer, line.messages(), line.objects("tools"), thinking))
            except TokenizerError as error:
                raise TokenizerError(f"{line.where}: {error}") from error
    if not sequences:
        raise ArgumentError(f"{file} holds no text; pass a file with conversations (.jsonl) or plain text")
    return sequences


def calibration_tokens(path: str | os.PathLike[str], tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Returns the first ``count`` tokens of a file, for ``flash_moe.packing.convert.convert``. The last sequence may be
    cut.

    Raises:
        The errors of :func:`read_sequences`.
    """
    sequences: list[list[int]] = []
    for sequence in read_sequences(path, tokenizer):
        if count <= 0:
            break
        sequences.append(list(sequence.tokens[:count]))
        count -= len(sequence.tokens)
    return sequences


def windows(tokens: Sequence[int], size: int) -> list[TokenSequence]:
    """Divides tokens into sequences of ``size``. A shorter rest is dropped unless it is the only sequence."""
    parts = [tuple(tokens[i * size : (i + 1) * size]) for i in range(max(len(tokens) // size, 1))]
    return [TokenSequence(part, (False,) * len(part)) for part in parts if part]


def conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
) -> TokenSequence:
    """Returns a whole conversation as rendered by the model's chat template.

    The assistant's tokens are those after each header of an assistant message, up to and including the token that ends
    the message. The header is the first line that the template adds for a reply.

    Raises:
        TokenizerError: there is no chat template, or the messages do not fit it.
    """
    text, prompt = (
        tokenizer.apply_chat_template(
            messages, tools=tools, enable_thinking=enable_thinking, add_generation_prompt=prompted
        )
        for prompted in (False, True)
    )
    tokens = tokenizer.encode(text)
    added = prompt.removeprefix(text) if prompt.startswith(text) else ""
    header = tokenizer.encode(added[: added.find("\n") + 1])
    return TokenSequence(tuple(tokens), _after(tokens, header, tokenizer.eos_token_ids))


def _after(tokens: list[int], header: list[int], ends: frozenset[int]) -> tuple[bool, ...]:
    """Returns flags for the tokens between a header and the next end token, including the end token."""
    inside, flags = False, [False] * len(tokens)
    for i, token in enumerate(tokens if header and ends else ()):
        if inside:
            flags[i], inside = True, token not in ends
        elif i + 1 >= len(header):
            inside = tokens[i + 1 - len(header) : i + 1] == header
    return tuple(flags)
