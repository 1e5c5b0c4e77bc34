"""The process in which kernels are tried: one that crashes or hangs takes nothing of the user's with it.

Reads one case a line from its standard input, as JSON, and answers each with one line: a verdict.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TextIO

import mlx.core as mx


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print must not stand among the answers
    from ..mlx_cache import clear_cache
    from .trial import Verdict, judge
    from .trials import trial_of

    mx.random.seed(int.from_bytes(os.urandom(4), "little"))
    mx.eval(mx.ones(1) + 1)  # starts the GPU
    _say(answers, "ready")
    for line in sys.stdin:
        case = json.loads(line)
        try:
            verdict = judge(trial_of(case))
        except Exception as error:  # whatever the compiler or the GPU has against it
            verdict = Verdict(False, False, f"{type(error).__name__}: {_first_lines(str(error))}")
        _say(answers, json.dumps(dataclasses.asdict(verdict)))
        clear_cache()


def _say(answers: TextIO, line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


def _first_lines(message: str, most: int = 300) -> str:
    return " ".join(message.split())[:most]
