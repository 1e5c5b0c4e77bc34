"""What training must not see, so that models/eval measures words, names and schemas from outside the generator.

`models/eval/plain_requests.jsonl` and `questions.jsonl` were written before anybody had read the generator, the files that
begin with `second_` by somebody who never read it. Training sees none of the questions, no request that a tool fits, and no
function with the name of one of theirs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[3] / "models" / "eval"
_IGNORED = re.compile(r"[^a-z0-9]+")


def plain(text: str) -> str:
    """A text without case, spaces and punctuation."""
    return _IGNORED.sub("", text.lower())


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]


_REQUESTS = _read("plain_requests.jsonl") + _read("second_requests.jsonl")
_QUESTIONS = _read("questions.jsonl") + _read("second_questions.jsonl")
FUNCTIONS = frozenset(plain(tool["function"]["name"]) for request in _REQUESTS for tool in request["tools"])
TEXTS = frozenset(
    {plain(request["messages"][-1]["content"]) for request in _REQUESTS if request["calls"]}
    | {plain(question["question"]) for question in _QUESTIONS}
)


def is_unseen_function(name: str) -> bool:
    """Whether a function's name, in whatever style, is one that training must not see."""
    return plain(name) in FUNCTIONS


def may_be_trained_on(conversation: dict[str, Any]) -> bool:
    """Whether a conversation holds none of the texts and functions."""
    return not any(is_unseen_function(tool["function"]["name"]) for tool in conversation["tools"] or ()) and not any(
        message["role"] == "user" and plain(message["content"]) in TEXTS for message in conversation["messages"]
    )
