"""Short chat: greetings, thanks, and requests that need nothing but the message itself."""

from __future__ import annotations

from random import Random
from typing import Any

from .splits import pick
from .text import phrase, phrases, read_table, say
from .values import text
from .words import word

_SYSTEM = phrases(
    "You are a helpful assistant.; You are a [careful|friendly|concise] assistant.; Answer briefly.; Be [brief|short|polite].;"
    "Use the tools when they help.; You [help|assist] with everyday tasks.; Today is 2027-0{d}-1{d}."
)
_EXCHANGES = [(phrase(user), phrase(assistant)) for _, (user, assistant) in read_table("chat.txt")]


def system_messages(rng: Random, share: float) -> list[dict[str, Any]]:
    """A short system message, in ``share`` of all cases."""
    if rng.random() >= share:
        return []
    text = say(rng, pick(rng, _SYSTEM)).format(d=1 + int(rng.random() * 9))
    return [{"role": "system", "content": text}]


class Dialogue:
    """Collects the messages of a conversation.

    Args:
        thinks, system: shares of the conversations in which the model reasons, and that begin with a system message.
    """

    def __init__(self, rng: Random, thinks: float, system: float) -> None:
        self.rng, self.thinking = rng, rng.random() < thinks
        self.messages = system_messages(rng, system)

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def assistant(self, content: str, thought: str, calls: list[dict[str, Any]] | None = None) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.thinking:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)

    def tool(self, content: str) -> None:
        self.messages.append({"role": "tool", "content": content})

    def done(self, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {"messages": self.messages, "tools": tools, "enable_thinking": self.thinking}


def chat(rng: Random, split: str) -> dict[str, Any]:
    """One or two short exchanges."""
    small = int(rng.random() * 900)
    fields = {
        "text": text(rng, split), "name": word(rng, split, "names"), "small": small,
        "large": small + 1 + int(rng.random() * 90),
    }  # fmt: skip
    messages = system_messages(rng, 0.1)
    for user, assistant in rng.sample(_EXCHANGES, 1 if rng.random() < 0.7 else 2):
        messages.append({"role": "user", "content": say(rng, user).format(**fields)})
        messages.append({"role": "assistant", "content": say(rng, assistant).format(**fields)})
    return {"messages": messages, "tools": None, "enable_thinking": False}
