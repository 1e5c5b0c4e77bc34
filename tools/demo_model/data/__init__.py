"""The demo model's training data: conversations from templates and word lists of our own, drawn from a seed.

Most offer tools, whose names differ in every conversation: half of them are made-up words, so that a model can only
learn to read the schema and to copy. The others ask about flash_moe, want JSON, or just chat. Names of functions,
parameters, enum values and JSON fields in the held-out data never occur in training (`splits.py`).
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from itertools import accumulate
from random import Random
from typing import Any

from .arithmetic import arithmetic
from .chat import chat
from .extraction import extraction
from .natural import (
    chat_beside_everyday_tools,
    everyday_call,
    no_everyday_tool,
    two_everyday_calls,
    without_a_value,
)
from .plain_extraction import plain_extraction
from .questions import outside, questions
from .splits import TRAIN
from .tool_calls import (
    chat_beside_tools,
    find_then_act,
    missing_argument,
    no_tool_fits,
    one_call,
    several_requests,
    two_calls,
)
from .unseen import may_be_trained_on

# How often each kind is drawn.
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
"""Kinds whose held-out conversations are made of words and names that training never sees."""

EVERYDAY = {
    everyday_call: 130,
    two_everyday_calls: 12,
    without_a_value: 6,
    no_everyday_tool: 14,
    chat_beside_everyday_tools: 14,
    questions: 110,
    outside: 26,
    plain_extraction: 16,
}
"""Kinds that training adds; models/eval/plain_requests.jsonl and questions.jsonl measure them (unseen.py)."""


def _drawn_from(shares: dict[Any, int]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    return tuple(shares), tuple(accumulate(shares.values()))


_HELD_OUT = _drawn_from(KINDS)
_TRAIN = _drawn_from(Counter(KINDS) + Counter(EVERYDAY))


def conversation(rng: Random, split: str) -> dict[str, Any]:
    """A conversation, the same for the same state of ``rng``.

    Args:
        split: "train" or "held-out".

    Returns:
        `{"messages": [...], "tools": [...] or None, "enable_thinking": bool}` with messages and tools in OpenAI's form.
    """
    makers, bounds = _TRAIN if split == TRAIN else _HELD_OUT
    while True:
        made = makers[bisect(bounds, rng.random() * bounds[-1])](rng, split)
        if split != TRAIN or may_be_trained_on(made):
            return made
