"""Actions composed of a verb and a noun, real or made up, with random properties: without end, and never two alike."""

from __future__ import annotations

from random import Random

from .actions import SLOTS, Action, Slot
from .splits import Words, pick
from .text import a, read_table
from .values import Enum, Nested, integer, kind, number, strings
from .words import WORDS, pseudo_word, word


def _read_verbs() -> list[tuple[tuple[str, str], ...]]:
    """Groups of verbs of like meaning, each verb with its participle."""
    groups = []
    for _, (line,) in read_table("verbs.txt"):
        pairs = [verb.partition("/") for verb in line.split()]
        groups.append(tuple((verb, participle or _participle(verb)) for verb, _, participle in pairs))
    return groups


def _participle(verb: str) -> str:
    if verb[-1] == "e":
        return verb + "d"
    return verb[:-1] + "ied" if verb[-1] == "y" and verb[-2] not in "aeiou" else verb + "ed"


def third_person(verb: str) -> str:
    """`add` → `adds`, `copy` → `copies`"""
    if verb[-1] == "y" and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s")


VERBS = _read_verbs()
_NUMERIC = (integer(1, 20), integer(10, 900), integer(100, 5000, 50), number(0.5, 40, 0.5), number(0.01, 3, 0.01))
_TEXTUAL = tuple(kind(name) for name in ("id", "names", "surnames", "place", "cities", "text", "nouns", "colors"))
_OPTIONS = Enum(WORDS["options"])
_LISTS = (strings("adjectives"), strings("nouns"), strings("names"), kind("numbers"))


_NESTED = tuple(
    Slot(key, Words(names.split()), Nested({label: kind(spec) for label, spec in parts.items()}), key,
         (description,), (f"with the {key} {{v}}", f"with {key}: {{v}}"))
    for key, names, description, parts in (
        ("size", "size dimensions the_size box_size new_size", "width and height", {"width": "int:1:90", "height": "int:1:90"}),
        ("range", "range span limits between value_range", "lowest and highest value", {"from": "int:0:50", "to": "int:51:99"}),
        ("contact", "contact contact_data person_data reach", "name and phone number", {"name": "names", "phone": "phone"}),
        ("address", "address place postal_address location", "city and house number", {"city": "cities", "number": "int:1:200"}),
        ("period", "period window dates time_span", "first and last day", {"start": "date", "end": "date"}),
    )
)  # fmt: skip


def thing(rng: Random, split: str) -> str:
    """What a composed action acts on."""
    return word(rng, split, "nouns", 0.4)


def _attribute(rng: Random, split: str, noun: str) -> Slot:
    """A property of a thing, of any type."""
    shape = rng.random()
    if shape < 0.04:
        return pick(rng, _NESTED)
    made_up = pseudo_word(rng, split) if rng.random() < 0.3 else None
    if shape < 0.32:
        name, values = made_up or word(rng, split, "attributes", 0), pick(rng, _NUMERIC)
        wordings = (f"with {a(name)} of {{v}}", f"{name} {{v}}", f"with the {name} at {{v}}", f"with {name} {{v}}")
    elif shape < 0.55:
        name, values = made_up or word(rng, split, "labels", 0), pick(rng, _TEXTUAL)
        wordings = (f"with the {name} {{v}}", f"{name} {{v}}", f"with {{v}} as the {name}", f"with {name} {{v}}")
    elif shape < 0.72:
        name, values = made_up or word(rng, split, "qualities", 0), _OPTIONS
        wordings = (f"with the {name} {{v}}", f"in {{v}} {name}", f"with {name} set to {{v}}", f"with {{v}} {name}")
    elif shape < 0.88:
        name = made_up or word(rng, split, "features", 0)
        description = pick(rng, (f"whether to use {name}", f"turns {name} on or off", f"with {name} or without"))
        return Slot(
            name, _property_names(name, noun), kind("bool"), name, (description,),
            (f"with {name}", f"with {name} on", f"with {name} enabled", f"including {name}"),
            (f"without {name}", f"with {name} off", f"with {name} disabled", f"with no {name}"),
        )  # fmt: skip
    else:
        name, values = made_up or word(rng, split, "collections", 0), pick(rng, _LISTS)
        wordings = (f"with the {name} {{v}}", f"with these {name}: {{v}}", f"{name} {{v}}")
    descriptions = (f"the {name} of the {noun}", f"{name} of the {noun}", f"the {name}", f"{name} to use")
    return Slot(name, _property_names(name, noun), values, name, descriptions, wordings)


def _property_names(name: str, noun: str) -> Words:
    return Words((name, f"{noun}_{name}", f"new_{name}", f"{name}_value", f"the_{name}", f"with_{name}", f"{name}_of"))


_CALLED = SLOTS["id"], *(
    Slot("name", Words(f"name {noun}_name label_name which called item the_name".split()), kind(spec), "name",
         ("its name", "name of the one to use"), ("called {v}", "named {v}", "with the name {v}"))
    for noun, spec in (("thing", "place"), ("object", "names"), ("unit", "host"))
)  # fmt: skip


def compose(rng: Random, split: str, noun: str, group: int) -> Action:
    """An action made of a verb and a noun, with random properties as slots.

    Args:
        noun: what it acts on. group: index of the group of verbs of like meaning.
    """
    verbs = VERBS[group]
    verb, participle = pick(rng, verbs)
    slots = []
    if rng.random() < 0.6:
        slots.append((pick(rng, _CALLED), True))
    for _ in range(int(rng.random() * 3.3)):
        attribute = _attribute(rng, split, noun)
        if all(attribute.key != slot.key for slot, _ in slots):
            slots.append((attribute, rng.random() < 0.5))
    tail = pick(rng, ("", "", "", " of the user", " in the system", " for good", " right away"))
    which = pick(rng, (a(noun), f"one {noun}", f"the given {noun}"))
    synonyms = {f"{one}_{noun}" for one, _ in verbs}
    return Action(
        noun,
        Words((*sorted(synonyms), f"{noun}_{verb}", f"do_{verb}_{noun}", f"{verb}_the_{noun}")),
        (f"{third_person(verb).capitalize()} {which}{tail}.",),
        f"{verb} {a(noun)}",
        tuple(f"{one} {pick(rng, ('the', 'the', 'my', 'this', 'that'))} {noun}" for one, _ in verbs),
        (),
        tuple(slots),
        f"the {noun} is {participle}",
    )


def compose_getter(rng: Random, split: str, noun: str) -> Action:
    """An action that looks up one property of a thing."""
    name = word(rng, split, pick(rng, ("attributes", "labels")), 0.3)
    value = pick(rng, _NUMERIC) if name in WORDS["attributes"].every else pick(rng, _TEXTUAL)
    return Action(
        noun,
        Words((f"get_{noun}_{name}", f"{noun}_{name}", f"read_{name}", f"{name}_of_{noun}", f"fetch_{name}")),
        (f"Returns the {name} of {a(noun)}.", f"Looks up the {name} of {a(noun)}."),
        f"look up the {name} of {a(noun)}",
        (f"look up the {name} of the {noun}", f"get the {name} of the {noun}", f"tell me the {name} of the {noun}"),
        (f"what is the {name} of the {noun}", f"what {name} does the {noun} have"),
        ((pick(rng, _CALLED), True),),
        "",
        ((name, value),),
        f"The {name} of the {noun} is {{{name}}}.",
    )


def verb_group(rng: Random, not_in: tuple[int, ...] = ()) -> int:
    """A random group of verbs, other than those given."""
    while True:
        group = int(rng.random() * len(VERBS))
        if group not in not_in:
            return group
