"""The demo model's training data: conversations made of templates and word lists of our own, drawn from a seed."""

from __future__ import annotations

from random import Random
from typing import Any

from .tool_calls import find_then_act, missing_argument, no_tool_fits, one_call, two_calls

_T = [one_call]*6+[two_calls,missing_argument,no_tool_fits,find_then_act]

def conversation(rng: Random, split: str) -> dict[str, Any]:
    return _T[int(rng.random()*len(_T))](rng, split)
