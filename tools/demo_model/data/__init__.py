"""The demo model's training data: conversations from templates and word lists of our own, drawn from a seed.

Most offer tools, whose names differ in every conversation: half of them are made-up words, so that a model can only
learn to read the schema and to copy. The others ask about flash_moe, want JSON, or just chat. Names of functions,
parameters, enum values and JSON fields in the held-out data never occur in training (`splits.py`).
"""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from random import Random
from typing import Any

from .arithmetic import arithmetic
from .chat import chat
from .extraction import extraction
from .questions import outside, questions
from .tool_calls import (
    chat_beside_tools,
    find_then_act,
    missing_argument,
    no_tool_fits,
    one_call,
    several_requests,
    two_calls,
)

# How often each kind is drawn. In tokens, which is what counts in training, tool calls make up 83%, questions 9%,
# extraction and arithmetic 3% each: copying from an unseen schema is what takes longest to learn.
KINDS = {
    one_call: 36,
    several_requests: 34,
    two_calls: 9,
    missing_argument: 5,
    no_tool_fits: 8,
    find_then_act: 4,
    chat_beside_tools: 3,
    questions: 50,
    outside: 4,
    extraction: 15,
    arithmetic: 6,
    chat: 12,
}
_MAKERS = tuple(KINDS)
_BOUNDS = tuple(accumulate(KINDS.values()))


def conversation(rng: Random, split: str) -> dict[str, Any]:
    """A conversation, the same for the same state of ``rng``.

    Args:
        split: "train" or "held-out".

    Returns:
        `{"messages": [...], "tools": [...] or None, "enable_thinking": bool}` with messages and tools in OpenAI's form.
    """
    return _MAKERS[bisect(_BOUNDS, rng.random() * _BOUNDS[-1])](rng, split)
