"""What tools can do: actions and what they need to know, from tables."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .splits import TRAIN, Words
from .text import Phrase, phrase, phrases, read_table
from .values import Kind, kind


@dataclass(frozen=True)
class Slot:
    """One thing that an action needs to know.

    Attributes:
        names: names that a schema may give it, in snake_case.
        label: what to ask the user for.
        descriptions: for the schema.
        wordings: how the user says it, around `{v}`; for yes/no the wordings of yes.
        denials: for yes/no, the wordings of no.
    """

    key: str
    names: Words
    kind: Kind
    label: str
    descriptions: tuple[Phrase, ...]
    wordings: tuple[Phrase, ...]
    denials: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Action:
    """Something that a tool does.

    Attributes:
        domain: actions of one domain are near each other.
        infinitive: what it does, as in "I can ...".
        asks: how a user asks for it, as a command. questions: the same as a question.
        slots: each with whether it is required.
        done: what to report of an action without results.
        results: names and kinds of what it returns. answer: how to report them.
    """

    domain: str
    names: Words
    descriptions: tuple[Phrase, ...]
    infinitive: str
    asks: tuple[Phrase, ...]
    questions: tuple[Phrase, ...]
    slots: tuple[tuple[Slot, bool], ...]
    done: str = ""
    results: tuple[tuple[str, Kind], ...] = ()
    answer: str = ""


def _read_slots() -> dict[str, Slot]:
    slots = {}
    for _, (names, spec, label, descriptions, wordings, *denials) in read_table("slots.txt"):
        key = names.split()[0]
        slots[key] = Slot(
            key, Words(names.split()), kind(spec), label, phrases(descriptions), phrases(wordings),
            phrases(denials[0]) if denials else (),
        )  # fmt: skip
    return slots


def _read_actions(slots: dict[str, Slot]) -> dict[str, list[Action]]:
    domains: dict[str, list[Action]] = {}
    for domain, (names, descriptions, asks, keys, outcome) in read_table("actions.txt"):
        ways = [ask.strip() for ask in asks.split(";")]
        fields, arrow, answer = outcome.partition(" => ")
        results = [field.split("=") for field in fields.split()] if arrow else []
        action = Action(
            domain,
            Words(names.split()),
            phrases(descriptions),
            ways[0].removeprefix("!"),
            tuple(phrase(way) for way in ways if way[0] not in "?!"),
            tuple(phrase(way[1:]) for way in ways if way[0] == "?"),
            tuple((slots[key.removesuffix("?")], not key.endswith("?")) for key in keys.split()),
            "" if arrow else outcome,
            tuple((name, kind(spec)) for name, spec in results),
            answer,
        )
        domains.setdefault(domain, []).append(action)
    return domains


SLOTS = _read_slots()
DOMAINS = _read_actions(SLOTS)
ACTIONS = tuple(action for actions in DOMAINS.values() for action in actions)


def result_values(rng: Random, split: str, action: Action) -> dict[str, object]:
    """What the action's tool returns."""
    return {name: values.value(rng, split, values.schema(rng, TRAIN))[0] for name, values in action.results}
