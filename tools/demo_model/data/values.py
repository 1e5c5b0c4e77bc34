"""Values of arguments, with the words in which a user gives them.

The argument always follows from the words by one of these rules, and by nothing else:

- a string is what the user wrote, letter by letter; quotation marks around it are left out
- an enum's value is what the user wrote, with underscores for the spaces
- a number is the user's digits; up to twelve it may be spelled out
- a list is the parts between commas and "and"
- yes and no follow from wordings such as "with sound" and "without sound"
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from .splits import TRAIN, Words, belongs, pick
from .text import listing, phrases, say
from .words import WORDS, pseudo_word, word

Value = tuple[Any, str]  # the argument, and how the user says it
_NUMBERS = WORDS["numbers"].every
_MONTHS = WORDS["months"].every
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_TEXTS = phrases(
    "Lunch with {name}; Call {name}; call {name} back; buy {food}; buy {food} and {food2}; the {noun} is {adjective};"
    "{adjective} {noun}; {adjective} {noun} for {name}; See you in {city}; remember the {noun}; Happy birthday, {name}!;"
    "Review of the {adjective} {noun}; the {noun} needs a new {noun2}; Trip to {city}; I will be late;"
    "meet {name} at the {noun}; {noun} and {noun2}; clean the {noun}; Please bring the {noun}; {city} in spring;"
    "Where is the {noun}?; order {food} for {name}; [Notes|Plan|Ideas] for the {noun}; All {adjective}, no {noun}"
)


class Kind:
    """A kind of value: its JSON schema, and examples of it.

    Args:
        make: draws a value.
        last: the wording is long, and is put at the end of a request.
    """

    def __init__(self, schema: dict[str, Any], make: Callable[[Random, str], Value], last: bool = False) -> None:
        self._schema, self._make, self.last = schema, make, last

    def schema(self, rng: Random, split: str) -> dict[str, Any]:
        """A JSON schema for one parameter of this kind."""
        return self._schema

    def value(self, rng: Random, split: str, schema: dict[str, Any]) -> Value:
        """A value that obeys ``schema``."""
        return self._make(rng, split)


class Enum(Kind):
    """One of a few strings, which differ from schema to schema."""

    def __init__(self, pool: Words) -> None:
        self._pool, self.last = pool, False

    def schema(self, rng: Random, split: str) -> dict[str, Any]:
        allowed = list(self._pool.train if split == TRAIN else self._pool.held_out)
        count = 2 + int(rng.random() * 3)
        while len(allowed) < count:
            allowed.append(pseudo_word(rng, split))
        rng.shuffle(allowed)
        return {"type": "string", "enum": allowed[:count]}

    def value(self, rng: Random, split: str, schema: dict[str, Any]) -> Value:
        chosen = pick(rng, schema["enum"])
        return chosen, chosen.replace("_", " ")


def integer(low: int, high: int, step: int = 1) -> Kind:
    def make(rng: Random, split: str) -> Value:
        value = low + step * int(rng.random() * ((high - low) // step + 1))
        return value, _NUMBERS[value] if 2 <= value <= 12 and rng.random() < 0.08 else str(value)

    return Kind({"type": "integer"}, make)


def number(low: float, high: float, step: float) -> Kind:
    def make(rng: Random, split: str) -> Value:
        value = round(low + step * int(rng.random() * ((high - low) / step + 1)), 4)
        value = int(value) if value == int(value) else value
        return value, str(value)

    return Kind({"type": "number"}, make)


class Nested(Kind):
    """An object of a few values."""

    def __init__(self, parts: dict[str, Kind]) -> None:
        self._parts, self.last = parts, True

    def schema(self, rng: Random, split: str) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for label, part in self._parts.items():
            if belongs(label, split) and rng.random() < 0.8:
                properties[label] = part.schema(rng, split)
            else:
                properties[pseudo_word(rng, split)] = {**part.schema(rng, split), "description": label}
        return {"type": "object", "properties": properties, "required": list(properties)}

    def value(self, rng: Random, split: str, schema: dict[str, Any]) -> Value:
        values, words = {}, []
        for (label, part), (name, one) in zip(self._parts.items(), schema["properties"].items(), strict=True):
            values[name], said = part.value(rng, split, one)
            words.append(f"{label} {said}")
        return values, listing(words)


def _string(make: Callable[[Random, str], str], last: bool = False) -> Kind:
    def same(rng: Random, split: str) -> Value:
        value = make(rng, split)
        return value, value

    return Kind({"type": "string"}, same, last)


def _words(kind: str, pseudo: float = 0.2) -> Kind:
    return _string(lambda rng, split: word(rng, split, kind, pseudo))


def strings(kind: str) -> Kind:
    """A list of two to four different words."""

    def make(rng: Random, split: str) -> Value:
        items = list(dict.fromkeys(word(rng, split, kind).replace("_", " ") for _ in range(2 + int(rng.random() * 3))))
        return items, listing(items)

    return Kind({"type": "array", "items": {"type": "string"}}, make, last=True)


def _numbers(rng: Random, split: str) -> Value:
    items = [int(rng.random() * pick(rng, (10, 100, 1000))) for _ in range(2 + int(rng.random() * 3))]
    return items, listing([str(i) for i in items])


def _digits(rng: Random, count: int) -> str:
    return "".join([str(int(rng.random() * 10)) for _ in range(count)])


def _id(rng: Random, split: str) -> str:
    shape, letter = rng.random(), pick(rng, _LETTERS)
    if shape < 0.4:
        return f"{letter}-{_digits(rng, 4)}"
    if shape < 0.6:
        return f"{letter}{pick(rng, _LETTERS)}{_digits(rng, 3)}"
    if shape < 0.75:
        return f"{letter}{pick(rng, _LETTERS)}{pick(rng, _LETTERS)}-{_digits(rng, 2)}"
    return _digits(rng, 5) if shape < 0.85 else f"{pseudo_word(rng, split)}-{_digits(rng, 2)}"


def _date(rng: Random, split: str) -> str:
    year, month, day = 2026 + int(rng.random() * 4), int(rng.random() * 12), 1 + int(rng.random() * 28)
    shape = rng.random()
    if shape < 0.6:
        return f"{year}-{month + 1:02}-{day:02}"
    if shape < 0.75:
        return f"{_MONTHS[month]} {day}"
    return f"{day} {_MONTHS[month]}" if shape < 0.87 else f"{day} {_MONTHS[month]} {year}"


def _time(rng: Random, split: str) -> str:
    return f"{int(rng.random() * 24):02}:{5 * int(rng.random() * 12):02}"


def _full_name(rng: Random, split: str) -> str:
    return f"{word(rng, split, 'names', 0.1)} {word(rng, split, 'surnames')}"


def _place(rng: Random, split: str) -> str:
    adjective, noun = word(rng, split, "adjectives", 0.15), word(rng, split, "nouns", 0.15)
    return f"{adjective.capitalize()} {noun.capitalize()}"


def _email(rng: Random, split: str) -> str:
    return f"{word(rng, split, 'names').lower()}@{pseudo_word(rng, split)}.{pick(rng, ('com', 'org', 'net', 'io'))}"


def _file(rng: Random, split: str) -> str:
    stem = pick(rng, (word(rng, split, "nouns"), f"{word(rng, split, 'adjectives')}_{word(rng, split, 'nouns')}"))
    return f"{stem}.{pick(rng, ('txt', 'csv', 'pdf', 'md', 'png', 'json', 'zip', 'py'))}"


def _folder(rng: Random, split: str) -> str:
    return f"/{word(rng, split, 'nouns')}/{word(rng, split, 'nouns')}"


def _host(rng: Random, split: str) -> str:
    return f"{word(rng, split, 'nouns', 0.5)}-{1 + int(rng.random() * 20):02}"


def text(rng: Random, split: str) -> str:
    """A short title or message."""
    return say(rng, pick(rng, _TEXTS)).format(
        name=word(rng, split, "names"), food=word(rng, split, "foods", 0.1), food2=word(rng, split, "foods", 0.1),
        noun=word(rng, split, "nouns", 0.15), noun2=word(rng, split, "nouns", 0.15),
        adjective=word(rng, split, "adjectives", 0.1), city=word(rng, split, "cities"),
    )  # fmt: skip


def _quoted(rng: Random, split: str) -> Value:
    value = text(rng, split)
    return value, f'"{value}"' if rng.random() < 0.8 else f"'{value}'"


def _topic(rng: Random, split: str) -> str:
    return word(rng, split, "topics").replace("_", " ")


def _foreign(rng: Random, split: str) -> str:
    return " ".join([pseudo_word(rng, split) for _ in range(2 + int(rng.random() * 3))])


_KINDS = {
    **{name: _words(name) for name in ("cities", "countries", "foods", "dishes", "plants", "products", "colors")},
    **{name: _words(name) for name in ("hobbies", "nouns")},
    "names": _words("names"),
    "languages": _words("languages", 0.05),
    "surnames": _string(_full_name),
    "id": _string(_id),
    "date": _string(_date),
    "day": _string(lambda rng, split: pick(rng, WORDS["days"].every)),
    "time": _string(_time),
    "place": _string(_place),
    "email": _string(_email),
    "file": _string(_file),
    "folder": _string(_folder),
    "host": _string(_host),
    "topic": _string(_topic),
    "foreign": _string(_foreign),
    "meaning": _string(lambda rng, split: f"{word(rng, split, 'adjectives')} {word(rng, split, 'nouns')}"),
    "phone": _string(lambda rng, split: f"555-{_digits(rng, 4)}"),
    "currency": _string(lambda rng, split: pick(rng, WORDS["currencies"].every)),
    "plate": _string(lambda rng, split: f"{pick(rng, _LETTERS)}{pick(rng, _LETTERS)} {_digits(rng, 4)}"),
    "version": _string(lambda rng, split: f"{int(rng.random() * 9)}.{int(rng.random() * 20)}"),
    "text": Kind({"type": "string"}, _quoted, last=True),
    "numbers": Kind({"type": "array", "items": {"type": "integer"}}, _numbers, last=True),
    "bool": Kind({"type": "boolean"}, lambda rng, split: (True, "yes") if rng.random() < 0.55 else (False, "no")),
}


def kind(spec: str) -> Kind:
    """The kind that a table names: `cities`, `int:1:12`, `num:0:5:0.5`, `of:low,high`, `list:foods`.

    Raises:
        ValueError: there is no such kind.
    """
    name, _, rest = spec.partition(":")
    if name == "int":
        return integer(*map(int, rest.split(":")))
    if name == "num":
        low, high, step = map(float, rest.split(":"))
        return number(low, high, step)
    if name == "of":
        return Enum(Words(rest.split(",")))
    if name == "list":
        return strings(rest)
    if name not in _KINDS:
        raise ValueError(f"found the kind {spec!r}, expected one of {sorted(_KINDS)}, int:, num:, of: or list:")
    return _KINDS[name]
