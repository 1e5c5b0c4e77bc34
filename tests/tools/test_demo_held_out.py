"""The demo model on requests and questions in words that its training data does not have, and how they are judged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from flash_moe import Model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from demo_held_out import EVAL, false_claims, is_right, is_true, read, replies

sys.path.pop()

REMIND: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Remind me to call Anna at 5 pm."}],
    "tools": [{"type": "function", "function": {"name": "add_reminder", "parameters": {
        "type": "object", "properties": {"task": {"type": "string"}, "time": {"type": "string"}}}}}],
    "calls": [{"name": "add_reminder", "arguments": {"task": "call Anna", "time": "5 pm"}}],
}  # fmt: skip


def called(task: str, time: str) -> str:
    arguments = f"<parameter=task>\n{task}\n</parameter>\n<parameter=time>\n{time}\n</parameter>\n"
    return f"<tool_call>\n<function=add_reminder>\n{arguments}</function>\n</tool_call>"


def test_a_call_is_right_or_not() -> None:
    assert is_right(REMIND, called("Call Anna", "5 pm."))
    assert not is_right(REMIND, called("call Anna at 5 pm", "5 pm"))
    assert not is_right(REMIND, called("call Anna", "5 pm") + called("call Anna", "5 pm"))
    assert not is_right(REMIND, "I will remind you.") and not is_right(REMIND, "<tool_call>\n<function=x")
    other = REMIND | {"also": [[{"name": "add_reminder", "arguments": {"task": "Anna", "time": "5 pm"}}]]}
    assert is_right(other, called("Anna", "5 pm")) and not is_right(REMIND, called("Anna", "5 pm"))


@pytest.mark.parametrize(
    "claim",
    [
        "It runs on Windows and Linux.", "Intel Macs work, too.", "You can send pictures.", "It was tested on a Mac.",
        "You can fine-tune models.", "Its weights take 209 GB.", "I have 20 million parameters.", "There is no server.",
        "Windows is not supported. It understands images.",
    ],
)  # fmt: skip
def test_a_false_claim_is_found(claim: str) -> None:
    assert false_claims({}, claim)
    assert not is_true({"true": ["."]}, claim)


@pytest.mark.parametrize(
    "answer",
    [
        "Windows is not supported.", "Intel Macs are not supported.", "Text only: no images.", "It has 18 million parameters.",
        "Nobody has tested it on a Mac.", "No, it has no fine-tuning.", "223 GB at 4 bits, and 5.2 GB of the weights in memory.",
    ],
)  # fmt: skip
def test_a_true_answer_is_not_a_false_claim(answer: str) -> None:
    assert not false_claims({}, answer)
    assert is_true({"true": ["."]}, answer)
    assert not is_true({"true": [".", "zebra"]}, answer) and not is_true({"true": ["."], "false": ["."]}, answer)


def score(requests: list[dict[str, Any]], questions: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Requests that are right though they need a call, questions answered truly, and answers with a false claim."""
    right = true = false = 0
    with Model.load("demo", experts_per_token=None, expert_io="resident", progress=False) as model:
        for case, text in replies(model, requests, questions):
            if "question" in case:
                true += is_true(case, text)
                false += bool(false_claims(case, text))
            else:
                right += bool(case["calls"]) and is_right(case, text)
    return right, true, false


def test_it_is_right_in_other_words() -> None:
    requests, questions = read(EVAL / "plain_requests.jsonl"), read(EVAL / "questions.jsonl")
    right, true, false = score(requests[:5], questions[7:11])
    assert (right, true, false) == (5, 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "questions", "least"),
    [("plain_requests", "questions", 28), ("second_requests", "second_questions", 25)],
)
def test_it_is_mostly_right_in_other_words(requests: str, questions: str, least: int) -> None:
    right, true, false = score(read(EVAL / f"{requests}.jsonl"), read(EVAL / f"{questions}.jsonl"))
    assert right >= least and true >= 45 and false == 0
