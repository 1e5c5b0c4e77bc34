"""Short chat: greetings, thanks, and requests that need nothing but the message itself."""

from __future__ import annotations

from random import Random
from typing import Any

from .splits import pick
from .text import phrase, read_table, say
from .values import text
from .words import word

_EXCHANGES = [(phrase(user), phrase(assistant)) for _, (user, assistant) in read_table("chat.txt")]


def chat(rng: Random, split: str) -> dict[str, Any]:
    """One or two short exchanges."""
    small = int(rng.random() * 900)
    fields = {
        "text": text(rng, split), "name": word(rng, split, "names"), "small": small,
        "large": small + 1 + int(rng.random() * 90),
    }  # fmt: skip
    messages = []
    for user, assistant in rng.sample(_EXCHANGES, 1 if rng.random() < 0.7 else 2):
        messages.append({"role": "user", "content": say(rng, user).format(**fields)})
        messages.append({"role": "assistant", "content": say(rng, assistant).format(**fields)})
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": pick(rng, ("You are a helpful assistant.", "Be brief."))})
    return {"messages": messages, "tools": None, "enable_thinking": False}
