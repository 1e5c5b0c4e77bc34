"""What people ask for every day, from a table: intents, their words, and the plain schemas of tools that do them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from .composed import third_person
from .everyday import LEXICON, Everyday, Said, everyday
from .functions import styled
from .splits import TRAIN, belongs, pick
from .text import Phrase, a, capital, phrase, say
from .unseen import is_unseen_function
from .words import pseudo_word

FIELD = re.compile(r"\{(\w+)([~-]?)\}")
STYLES = ("snake",) * 12 + ("camel",) * 4 + ("kebab", "pascal", "dotted")
_PREFIXES = ("my", "do", "run", "api", "user", "app", "v2", "home", "assistant", "quick", "tool")
_STRING, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


@dataclass(frozen=True)
class Slot:
    """Something that an intent may need to know: names for a parameter, its kind, and descriptions."""

    key: str
    names: tuple[str, ...]
    kind: str
    descriptions: tuple[str, ...]

    @property
    def draws(self) -> Everyday:
        return everyday(self.kind)


@dataclass(frozen=True)
class Wording:
    """One way to ask.

    Attributes:
        clause: a command in base form, or a free sentence, with fields `{key}`.
        free: whether it stands by itself, as questions do. implied: arguments that follow without being said.
    """

    clause: Phrase
    free: bool
    implied: dict[str, str]
    keys: frozenset[str]


@dataclass
class Intent:
    """Something that a tool can do for a user."""

    domain: str
    tags: frozenset[str]
    names: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    slots: dict[str, Slot] = field(default_factory=dict)
    wordings: list[Wording] = field(default_factory=list)
    done: str = ""
    results: tuple[tuple[str, str], ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class PlainTool:
    """An intent under the names of one API.

    Attributes:
        action: what it does in base form, as in "I can ...". parameters: slot keys with their names.
        codes: slots of which the schema wants a currency's code. texts: slots that are strings whatever their kind.
    """

    intent: Intent
    action: str
    noun: str
    name: str
    parameters: dict[str, str]
    codes: frozenset[str]
    texts: frozenset[str]
    required: frozenset[str]
    schema: dict[str, Any]

    def wordings(self) -> list[Wording]:
        """Those that say all that the schema requires, and nothing that it lacks."""
        return [one for one in self.intent.wordings if self.required <= one.keys <= self.parameters.keys()]


def _read() -> list[Intent]:
    intents: list[Intent] = []
    for line in (Path(__file__).parent / "intents.txt").read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "@":
            domain, *tags = rest.split()
            intents.append(Intent(domain, frozenset((domain, *tags))))
            continue
        intent = intents[-1]
        if mark == ">":
            intent.names = tuple(rest.split())
        elif mark == "d":
            intent.actions = tuple(rest.split("; "))
        elif mark == "p":
            names, _, more = rest.partition(":")
            kind, _, descriptions = more.rpartition(":")
            key, *others = names.split()
            intent.slots[key] = Slot(key, (key, *others), kind, tuple(descriptions.split("; ")))
        elif mark == "u":
            ways, _, implied = rest.partition(" => ")
            values = dict(pair.split("=") for pair in implied.split())
            for way in ways.split(" / "):
                free, clause = way.startswith("!"), way.removeprefix("!").strip()
                keys = frozenset(key for key, _ in FIELD.findall(clause))
                assert keys | values.keys() <= intent.slots.keys(), (
                    f"{clause!r} has fields that {intent.names[0]} lacks"
                )
                intent.wordings.append(Wording(phrase(clause), free, values, keys | values.keys()))
        elif mark == "r":
            intent.done = rest
        else:
            fields, _, intent.answer = rest.partition(" => ")
            # kinds may hold spaces: a field begins at a word with "="
            intent.results = tuple(tuple(part.split("=", 1)) for part in re.split(r" (?=\w+=)", fields))  # type: ignore[misc]
    return intents


INTENTS = _read()
_BY_DOMAIN = {domain: [one for one in INTENTS if one.domain == domain] for domain in {one.domain for one in INTENTS}}


def near(rng: Random, intent: Intent) -> Intent:
    """An intent that may stand beside this one without being meant: of its domain, or without a tag in common."""
    while True:
        if rng.random() < 0.45 and len(_BY_DOMAIN[intent.domain]) > 1:
            other = pick(rng, _BY_DOMAIN[intent.domain])
        else:
            other = pick(rng, INTENTS)
            if other.tags & intent.tags or "search" in other.tags:
                continue
        if other is not intent:
            return other


def plain_tool(rng: Random, intent: Intent, needed: frozenset[str], style: str, noun: str | None = None) -> PlainTool:
    """An intent as a tool whose schema has at least the ``needed`` slots; all but these are optional.

    Args:
        noun: what takes the place of `{%}` in the table.
    """
    noun = noun or pick(rng, LEXICON["thing"])
    made_up = rng.random() < 0.07
    pydantic, described = rng.random() < 0.3, rng.random()
    keys = [key for key in intent.slots if key in needed or rng.random() < 0.3]
    if rng.random() < 0.3:
        rng.shuffle(keys)
    names: dict[str, str] = {}
    properties: dict[str, Any] = {}
    codes, texts = set(), set()
    for key in keys:
        slot = intent.slots[key]
        name = _parameter(rng, slot, noun.replace(" ", "_"), made_up, style, set(names.values()))
        schema = _type(rng, slot)
        if schema["type"] == "string" and slot.kind == "mins":
            texts.add(key)
        if made_up or rng.random() < described or (slot.kind == "money" and rng.random() < 0.5):
            schema["description"] = _described(rng, pick(rng, slot.descriptions), noun)
            if slot.kind == "money" and "code" in schema["description"].lower():
                codes.add(key)
        names[key], properties[name] = name, schema
    demanded = [key for key in keys if key in needed and rng.random() < 0.9]
    required = [names[key] for key in demanded]
    if pydantic:
        for key in keys:
            name = names[key]
            if name not in required and properties[name]["type"] == "integer" and key not in needed:
                properties[name]["default"] = 1 + int(rng.random() * 5)
        properties = {name: dict(sorted(schema.items())) for name, schema in properties.items()}
        parameters: dict[str, Any] = {"additionalProperties": False, "properties": properties}
        parameters |= ({"required": required} if required else {}) | {"type": "object"}
    else:
        parameters = {"type": "object", "properties": properties}
        if required or rng.random() < 0.6:
            parameters["required"] = required
    action = named(pick(rng, intent.actions), noun)
    name = _function(rng, intent, noun.replace(" ", "_"), made_up, style)
    function: dict[str, Any] = {"name": name}
    if made_up or rng.random() < 0.6:
        function["description"] = _sentence(rng, action)
    tool = {"type": "function", "function": function | {"parameters": parameters}}
    return PlainTool(intent, action, noun, name, names, frozenset(codes), frozenset(texts), frozenset(demanded), tool)


def _type(rng: Random, slot: Slot) -> dict[str, Any]:
    name = slot.kind.partition(":")[0]
    if name == "of":
        options = slot.kind.partition(":")[2].split(",")
        listed = len(options) < 6 and all(belongs(option, TRAIN) for option in options) and rng.random() < 0.65
        return {"type": "string", "enum": options} if listed else dict(_STRING)
    if name == "int":
        return dict(_INTEGER if rng.random() < 0.85 else _NUMBER)
    if name in ("num", "number"):
        return dict(_NUMBER)
    if name == "numbers":
        return {"type": "array", "items": dict(_NUMBER if rng.random() < 0.5 else _INTEGER)}
    if name == "mins":
        return dict(pick(rng, (_INTEGER, _INTEGER, _INTEGER, _NUMBER, _STRING)))
    return dict(_STRING)


def _parameter(rng: Random, slot: Slot, noun: str, made_up: bool, style: str, taken: set[str]) -> str:
    while True:
        found = pseudo_word(rng, TRAIN) if made_up else slot.names[0] if rng.random() < 0.3 else pick(rng, slot.names)
        name = styled(found.replace("{%}", noun).split("_"), "camel" if style == "camel" else "snake")
        if name not in taken and belongs(name, TRAIN):
            return name


def _function(rng: Random, intent: Intent, noun: str, made_up: bool, style: str) -> str:
    while True:
        words = [pseudo_word(rng, TRAIN)] if made_up else pick(rng, intent.names).replace("{%}", noun).split("_")
        if rng.random() < 0.1:
            words.insert(int(rng.random() * 2) * len(words), pick(rng, _PREFIXES))
        name = styled(words, style, intent.domain.strip("%"))
        if belongs(name, TRAIN) and not is_unseen_function(name):
            return name


def _described(rng: Random, text: str, noun: str) -> str:
    text = named(text, noun)
    roll = rng.random()
    return text if roll < 0.4 else capital(text) if roll < 0.65 else f"{capital(text)}." if roll < 0.9 else f"{text}."


def _sentence(rng: Random, action: str) -> str:
    verb, _, rest = action.partition(" ")
    roll = rng.random()
    text = f"{third_person(verb)} {rest}".strip() if roll < 0.55 else action
    return capital(text) + ("." if rng.random() < 0.75 else "") if rng.random() < 0.92 else text


def drawn(rng: Random, tool: PlainTool, key: str, digits: bool) -> Said:
    """A value for a slot that obeys the tool's schema."""
    slot = tool.intent.slots[key]
    said = slot.draws(rng, digits)
    if key in tool.texts or (slot.kind == "money" and key not in tool.codes):
        return said._replace(value=said.words)
    return said


def clause_of(rng: Random, wording: Wording, noun: str) -> str:
    """The words of a wording, with its fields."""
    return named(say(rng, wording.clause), noun)


def named(text: str, noun: str) -> str:
    """A text of the table with ``noun`` in the place of `{%}`."""
    return text.replace("a {%}", a(noun)).replace("{%}", noun)
