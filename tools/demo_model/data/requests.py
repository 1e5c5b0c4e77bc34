"""What users say: a request for one function, from which every argument follows."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from .functions import Function, Parameter
from .splits import pick
from .text import capital, phrases, say

_COMMANDS = phrases(
    "{C}.; {C}.; {C}; {c}; Please {c}.; {C}, please.; Can you {c}?; Could you {c}?; Could you please {c}?; I want to {c}.;"
    "I need to {c}.; I'd like to {c}.; [Hey|Hi|Hello], {c}.; [Hey|Hi|Hello], can you {c}?; Would you {c}, please?;"
    "I would like you to {c}.; You should {c}[ now| for me|].; Help me {c}.; Let's {c}.; Time to {c}."
)
_QUESTIONS = phrases(
    "{C}?; {C}?; {c}?; {c}; Hi, {c}?; [Tell me|Quick question|I wonder]: {c}?; {C}? Thanks!; Do you know {c}?"
)
_PREFACES = phrases(
    "Good [morning|evening]!; I am in a [bit of a |]hurry.; One more thing.; I have a small [job|request] for you.;"
    "Sorry to bother you.; It has been a long day.; My hands are full.; Before I forget:; Next [one|thing].; Okay."
)


@dataclass(frozen=True)
class Request:
    """What a user asks for, and what follows from it.

    Attributes:
        clause: a command in base form ("book a table for 4 people"), or a question without its question mark.
        details: further sentences that hold arguments; may be empty.
        arguments: by name, in the order of the schema.
        spoken: the user's words for each slot, by the slot's key.
    """

    function: Function
    clause: str
    is_question: bool
    details: str
    arguments: dict[str, Any]
    spoken: dict[str, str]

    def text(self, rng: Random) -> str:
        """The whole message."""
        sentence = say(rng, pick(rng, _QUESTIONS if self.is_question else _COMMANDS))
        message = sentence.format(c=self.clause, C=capital(self.clause))
        if rng.random() < 0.07:
            message = f"{say(rng, pick(rng, _PREFACES))} {message}"
        if not self.details:
            return message
        if message[-1] not in ".?!":
            message += "."
        return f"{message}{self.details}"

    def call(self) -> dict[str, Any]:
        """The tool call that answers it."""
        return {"type": "function", "function": {"name": self.function.name, "arguments": self.arguments}}


def request(rng: Random, split: str, function: Function, omit: tuple[Parameter, ...] = ()) -> Request:
    """A request for a function: all required arguments but ``omit``, and some optional ones."""
    used = [p for p in function.parameters if (p.required or rng.random() < 0.45) and p not in omit]
    arguments: dict[str, Any] = {}
    spoken: dict[str, str] = {}
    given = []
    for parameter in used:
        value, words = parameter.value(rng, split)
        arguments[parameter.name], spoken[parameter.slot.key] = value, words
        given.append((parameter, value, words))
    action = function.action
    questions = bool(action.questions) and (not action.asks or rng.random() < 0.4)
    clause = say(rng, pick(rng, action.questions if questions else action.asks))
    rng.shuffle(given)
    given.sort(key=_is_long)
    if given and not questions and rng.random() < 0.12:
        return Request(function, clause, questions, _as_list(rng, given), arguments, spoken)
    parts = [_wording(rng, *one) for one in given]
    cut = len(parts) if len(parts) < 3 or rng.random() < 0.8 else 1 + int(rng.random() * (len(parts) - 1))
    details = f" {pick(rng, _MORE)} {_joined(rng, parts[cut:])}." if parts[cut:] else ""
    return Request(function, _joined(rng, [clause, *parts[:cut]]), questions, details, arguments, spoken)


_MORE = ("I want it", "Make it", "It should be", "Do it")


def _is_long(given: tuple[Parameter, Any, str]) -> bool:
    return given[0].slot.kind.last


def _wording(rng: Random, parameter: Parameter, value: Any, words: str) -> str:
    slot = parameter.slot
    return say(rng, pick(rng, slot.denials if value is False and slot.denials else slot.wordings)).format(v=words)


def _joined(rng: Random, parts: list[str]) -> str:
    if len(parts) < 3 or rng.random() < 0.5:
        return " ".join(parts)
    comma = ", ".join(parts[1:])
    if parts[-1].startswith("with") and rng.random() < 0.6:
        comma = f"{', '.join(parts[1:-1])} and {parts[-1]}"
    return f"{parts[0]} {comma}"


def _as_list(rng: Random, given: list[tuple[Parameter, Any, str]]) -> str:
    pairs = [f"{parameter.slot.label}: {words}" for parameter, _, words in given]
    if rng.random() < 0.4:
        return "\n" + "\n".join([f"- {pair}" for pair in pairs])
    return " " + capital(pick(rng, ("; ", ", ")).join(pairs)) + pick(rng, (".", ""))
