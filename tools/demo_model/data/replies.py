"""What tools return, and what the assistant says and thinks about it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from .actions import Action, result_values
from .requests import Request
from .splits import pick
from .text import capital, listing, phrases, say
from .values import kind

_DONE = phrases("Done: {d}.; {D}.; All set: {d}.; Okay, {d}.; {D} now.; That worked: {d}.")
_REFERENCES = phrases("The [reference|id] is {id}.; [Reference|Id]: {id}.; It has the id {id}.")
_ERRORS = (
    "timeout", "not found", "permission denied", "service unavailable", "rate limit exceeded", "invalid id",
    "not available on that date", "already exists", "connection refused", "quota used up", "device offline",
)  # fmt: skip
_FAILED = phrases(
    'I could not {i}: the tool [said|reported] "{e}".; That did not work: {e}. [Nothing was changed.|Shall I try again?];'
    'The tool failed with "{e}", so I could not {i}.; Sorry, that failed: {e}. [Please check the details.|]'
)
_NO_TOOL = phrases(
    "[None of my tools can do that|I have no tool for that|No tool here can do that|I cannot do that with the tools I have]."
    " I can {tools}."
)
_ASK = phrases(
    "[Which|What] {label} should I use?; Please tell me the {label}.; I need the {label} for that.; What is the {label}?;"
    "[Sure|Gladly], but I need the {label} first."
)
_ASK_TWO = phrases("I need the {label} and the {label2} for that.; Please tell me the {label} and the {label2}.")
_IDS = kind("id")
_COMPUTED: dict[str, Callable[[list[int]], Any]] = {
    "average": lambda numbers: round(sum(numbers) / len(numbers), 2),
    "largest": max,
    "sorted": sorted,
}


def tool_response(rng: Random, split: str, request: Request) -> dict[str, Any]:
    """What the tool returns when it works."""
    action = request.function.action
    if action.results:
        values = result_values(rng, split, action)
        for name in values.keys() & _COMPUTED.keys():
            values[name] = _COMPUTED[name](next(iter(request.arguments.values())))
        return values if rng.random() < 0.8 else {"status": "ok", **values}
    shape = rng.random()
    if shape < 0.3:
        return {"status": "ok"}
    if shape < 0.45:
        return {"ok": True}
    if shape < 0.55:
        return {"success": True}
    number = _IDS.value(rng, split, {})[0]
    return {"status": pick(rng, ("ok", "done", "success")), "id": number} if shape < 0.85 else {"id": number}


def error_response(rng: Random) -> dict[str, Any]:
    """What a tool returns when it fails."""
    reason = pick(rng, _ERRORS)
    return {"error": reason} if rng.random() < 0.7 else {"status": "error", "message": reason}


def answer(rng: Random, request: Request, response: dict[str, Any]) -> str:
    """What the assistant says about a tool's response."""
    action = request.function.action
    if (error := response.get("error") or response.get("message")) and response.get("status") != "ok":
        return say(rng, pick(rng, _FAILED)).format(i=action.infinitive, e=error).rstrip()
    if action.results:
        said = {name: _said(value) for name, value in response.items()}
        return action.answer.format(**(request.spoken | said))
    text = say(rng, pick(rng, _DONE)).format(d=action.done, D=capital(action.done))
    if number := response.get("id"):
        text += " " + say(rng, pick(rng, _REFERENCES)).format(id=number)
    return text


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return listing([str(item) for item in value]) if isinstance(value, list) else str(value)


def no_tool(rng: Random, actions: list[Action]) -> str:
    """The answer when no tool fits: says so, and what there is instead."""
    return say(rng, pick(rng, _NO_TOOL)).format(tools=listing([action.infinitive for action in actions], "or"))


def question(rng: Random, labels: list[str]) -> str:
    """Asks the user for one or two missing arguments."""
    if len(labels) == 1:
        return say(rng, pick(rng, _ASK)).format(label=labels[0])
    return say(rng, pick(rng, _ASK_TWO)).format(label=labels[0], label2=labels[1])


def thought_before_call(rng: Random, requests: list[Request]) -> str:
    """Which tool fits, why, and what the user gave."""
    thoughts = []
    for one in requests:
        given = ", ".join([f"{name} is {_said(value)}" for name, value in one.arguments.items()])
        thoughts.append(
            f"The user wants to {one.function.action.infinitive}. {one.function.name} does that"
            + (f": {given}." if given else ", and needs no arguments.")
        )
    return " ".join(thoughts)


def thought_before_answer(rng: Random) -> str:
    """After a tool's response."""
    return pick(
        rng, ("The tool has answered. I report it.", "I have the result and can answer.", "That is the answer.")
    )


def thought_before_question(request: Request, labels: list[str]) -> str:
    """When arguments are missing."""
    missing = " and the ".join(labels)
    return f"The user wants to {request.function.action.infinitive}, but did not say the {missing}. I ask."


def thought_before_refusal() -> str:
    """When no tool fits."""
    return "No tool here does what the user wants. I say so."
