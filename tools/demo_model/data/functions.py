"""Actions as functions of an API: names, parameters and JSON schemas, which differ in every conversation."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from .actions import Action, Slot
from .splits import TRAIN, belongs, pick
from .text import capital, say
from .values import Value
from .words import WORDS, pseudo_word

_ROLES, _FILLERS = WORDS["roles"].every, WORDS["fillers"].every
_STYLES = ("snake",) * 10 + ("camel",) * 4 + ("kebab", "dotted", "dotted", "pascal")


@dataclass(frozen=True)
class Parameter:
    """A slot under the name and schema that one function gives it."""

    name: str
    slot: Slot
    required: bool
    schema: dict[str, Any]

    def value(self, rng: Random, split: str) -> Value:
        """An argument that obeys the schema, and how a user says it."""
        return self.slot.kind.value(rng, split, self.schema)


@dataclass(frozen=True)
class Function:
    """An action with names: what the model sees as a tool.

    Attributes:
        tool: `{"type": "function", "function": {"name", "description", "parameters"}}`
    """

    action: Action
    name: str
    parameters: tuple[Parameter, ...]
    tool: dict[str, Any]


class Naming:
    """How one API names things: real words or made-up ones, in one style."""

    def __init__(self, rng: Random, split: str, made_up: float = 0.5) -> None:
        self._rng, self._split = rng, split
        self._style = pick(rng, _STYLES)
        self._made_up = rng.random() < made_up
        self._described = rng.random() < 0.65
        self._required_last = rng.random() < 0.9

    def function(self, action: Action) -> Function:
        """The action as a function."""
        rng = self._rng
        parameters: list[Parameter] = []
        slots = list(action.slots)
        if rng.random() < 0.3:
            rng.shuffle(slots)
        made_up = self._made_up and rng.random() < 0.6
        for slot, required in slots:
            name, says_nothing = self._parameter_name(slot, made_up, {parameter.name for parameter in parameters})
            schema = slot.kind.schema(rng, self._split)
            if says_nothing or self._described:
                description = {"description": say(rng, pick(rng, slot.descriptions))}
                schema = (
                    {**schema, **description}
                    if rng.random() < 0.7
                    else {"type": schema["type"], **description, **schema}
                )
            parameters.append(Parameter(name, slot, required, schema))
        name = self._function_name(action)
        properties: dict[str, Any] = {"type": "object", "properties": {p.name: p.schema for p in parameters}}
        required_names = [p.name for p in parameters if p.required]
        if required_names or self._required_last:
            properties["required"] = required_names
        description = capital(say(rng, pick(rng, action.descriptions)))
        if not description.endswith(".") and rng.random() < 0.7:
            description += "."
        schema = {"name": name, "description": description, "parameters": properties}
        return Function(action, name, tuple(parameters), {"type": "function", "function": schema})

    def _function_name(self, action: Action) -> str:
        rng, split = self._rng, self._split
        made_up = self._made_up
        while True:
            words = [pseudo_word(rng, split)] if made_up else pick(rng, action.names.every).split("_")
            if rng.random() < (0.45 if made_up else 0.4 if split == TRAIN else 0.5):
                words.insert(int(rng.random() * 2) * len(words), pick(rng, _ROLES))
            elif made_up and rng.random() < 0.2:
                words.append(pseudo_word(rng, split))
            name = styled(words, self._style, action.domain)
            if belongs(name, split):
                return name

    def _parameter_name(self, slot: Slot, made_up: bool, taken: set[str]) -> tuple[str, bool]:
        """A name that is not taken, and whether it is made up and says nothing."""
        rng, split = self._rng, self._split
        style = self._style if self._style in ("camel", "kebab") else "snake"
        while True:
            usual, *others = slot.names.every
            found = pseudo_word(rng, split) if made_up else usual if rng.random() < 0.3 else pick(rng, others)
            words = found.split("_")
            if not made_up and rng.random() < (0.3 if split == TRAIN else 0.5):
                words.insert(int(rng.random() * 2) * len(words), pick(rng, _FILLERS))
            name = styled(words, style)
            if name not in taken and belongs(name, split):
                return name, made_up


def styled(words: list[str], style: str, domain: str = "") -> str:
    """Words as a name: `add_event`, `addEvent`, `add-event`, `AddEvent` or `calendar.add_event`."""
    if style == "camel":
        return words[0] + "".join([w.capitalize() for w in words[1:]])
    if style == "pascal":
        return "".join([w.capitalize() for w in words])
    if style == "kebab":
        return "-".join(words)
    return (f"{domain}." if style == "dotted" and domain else "") + "_".join(words)
