"""The chat template in Python, and conversations as token ids with a loss mask.

`chat_template.jinja` defines the form; this is the same, a hundred times faster, and knows what the assistant says.
Earlier assistant turns keep their thinking blocks, so every turn is learned exactly as it is seen at inference, and
what was generated stays a prefix of the next prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoded = tuple[list[int], list[bool]]
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_NO_THINKING = "<think>\n\n</think>\n\n"


def render(conversation: Mapping[str, Any]) -> str:
    """The text of a conversation, equal to what the chat template renders without a generation prompt."""
    return "".join([text for text, _ in pieces(conversation)])


def pieces(conversation: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether the assistant produces it.

    A piece of the assistant begins behind the generation prompt and ends with `<|im_end|>`. Pieces meet only where
    tokens do, so they can be encoded one by one.

    Raises:
        ValueError: a message has an unknown role.
    """
    messages = conversation["messages"]
    split: list[tuple[str, bool]] = []
    pending = [_system(messages[0], conversation.get("tools"))]
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":
            thought = message.get("reasoning_content")
            pending.append("<|im_start|>assistant\n" + ("<think>\n" if thought else _NO_THINKING))
            split.append(("".join(pending), False))
            said = f"{thought}\n</think>\n\n{content}" if thought else content
            split.append((f"{said}{_tool_calls(message, bool(content))}<|im_end|>", True))
            pending = ["\n"]
        elif role == "user":
            pending.append(f"<|im_start|>user\n{content}<|im_end|>\n")
        elif role == "tool":
            first = i == 0 or messages[i - 1]["role"] != "tool"
            last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            pending.append("<|im_start|>user" if first else "")
            pending.append(f"\n<tool_response>\n{content}\n</tool_response>" + ("<|im_end|>\n" if last else ""))
        elif role != "system":
            raise ValueError(f"found the role {role!r}, expected system, user, assistant or tool")
    return [*split, ("".join(pending), False)]


def _system(first: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None) -> str:
    parts = [first["content"]] if first["role"] == "system" else []
    if tools:
        lines = "".join([_to_json(tool["function"]) + "\n" for tool in tools])
        parts.append(f"<tools>\n{lines}</tools>\nCall a tool if one fits, else answer in words.")
    return "<|im_start|>system\n{}<|im_end|>\n".format("\n\n".join(parts)) if parts else ""


def _tool_calls(message: Mapping[str, Any], after_text: bool) -> str:
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = "".join([
            f"<parameter={name}>\n{value if isinstance(value, str) else _to_json(value)}\n</parameter>\n"
            for name, value in function["arguments"].items()
        ])  # fmt: skip
        calls.append(f"<tool_call>\n<function={function['name']}>\n{arguments}</function>\n</tool_call>")
    return ("\n" if after_text and calls else "") + "\n".join(calls)


def encode(conversations: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Encoded]:
    """Token ids of conversations, and for each id whether the assistant produces it."""
    split = [pieces(conversation) for conversation in conversations]
    encodings = iter(tokenizer.encode_batch_fast([text for parts in split for text, _ in parts]))
    encoded = []
    for parts in split:
        ids: list[int] = []
        mask: list[bool] = []
        for _, produced in parts:
            piece = next(encodings).ids
            ids += piece
            mask += [produced] * len(piece)
        encoded.append((ids, mask))
    return encoded
