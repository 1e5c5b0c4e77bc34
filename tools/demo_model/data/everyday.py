"""Values as people write them: times, days, names with apostrophes, numbers in words, amounts of money, tasks.

A string argument is what the user wrote, letter by letter. A number may be spelled out or be said as "half an hour".
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from .composed import VERBS
from .splits import TRAIN, pick
from .spoken import Everyday, Said, date, day, minutes, money, number, time, when, written
from .text import listing, phrases, read_table, say
from .values import kind as table_kind
from .words import pseudo_word, word


def _lexicon() -> dict[str, tuple[str, ...]]:
    lines = (Path(__file__).parent / "lexicon.txt").read_text(encoding="utf-8").splitlines()
    return {name[2:]: tuple(words.split(", ")) for name, words in zip(lines[::2], lines[1::2], strict=True)}


LEXICON = _lexicon()
_PROPER = frozenset(("person", "city", "artist", "song", "movie", "book", "venue", "hotel", "title", "company"))
_COMPOSED = {name: (phrases(forms), float(share)) for _, (name, share, forms) in read_table("phrases.txt")}


def _entry(rng: Random, name: str, depth: int = 0) -> str:
    """A word or phrase of a lexicon list, or a composed one."""
    composed, share = _COMPOSED.get(name, ((), 0.0))
    if composed and ((depth < 2 and rng.random() < share) or (name not in LEXICON and depth < 3)):
        text = filled(rng, say(rng, pick(rng, composed)), depth + 1)
    elif name == "task":
        text = pick(rng, LEXICON["chore"])
    elif name in LEXICON:
        text = pick(rng, LEXICON[name])
    else:
        return _small(rng, name)
    return text[:1].upper() + text[1:] if name in _PROPER else text


def _small(rng: Random, name: str) -> str:
    if name in ("noun", "adjective"):
        return word(rng, TRAIN, f"{name}s", 0.15).replace("_", " ")
    if name == "verb":
        return pick(rng, pick(rng, VERBS))[0]
    if name == "surname":
        return word(rng, TRAIN, "surnames")
    if name == "pseudo":
        return pseudo_word(rng, TRAIN)
    if name == "letter":
        return pick(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ")
    if name == "digits":
        return str(int(10 ** (2 + 3 * rng.random())))
    if name == "plant":
        return word(rng, TRAIN, "plants")
    if name == "year":
        return str(1900 + int(rng.random() * 126))
    if name == "smallint":
        return str(2 + int(rng.random() * 90))
    return everyday(name)(rng, True).words


def filled(rng: Random, text: str, depth: int = 0) -> str:
    """A text with values in the place of its fields: `{city}`, `{noun}`, `{time~}` ("at 5 pm")."""
    while "{" in text:
        before, _, rest = text.partition("{")
        name, _, after = rest.partition("}")
        drawn = everyday(name[:-1])(rng, True).phrase if name[-1] == "~" else _entry(rng, name, depth)
        text = f"{before}{drawn}{after}"
    return text


def _verbatim(name: str) -> Everyday:
    def make(rng: Random, digits: bool) -> Said:
        text = _entry(rng, name)
        return Said(text, text, text)

    return make


def _expression(rng: Random, digits: bool) -> Said:
    a, b, c = (str(2 + int(rng.random() * pick(rng, (20, 200)))) for _ in range(3))
    text = f"{a} {pick(rng, '+-*/')} {b}"
    if rng.random() < 0.3:
        text = pick(rng, ("({}) {} {}", "{} {} {}")).format(text, pick(rng, "+-*"), c)
    text = text.replace(" ", "") if rng.random() < 0.3 else text
    return Said(text, text, text)


def _numbers(rng: Random, digits: bool) -> Said:
    items = [int(rng.random() * pick(rng, (10, 100, 1000))) for _ in range(2 + int(rng.random() * 4))]
    text = listing([str(item) for item in items]) if rng.random() < 0.7 else ", ".join(map(str, items))
    return Said(items, text, text)


def _integer(low: int, high: int) -> Everyday:
    def make(rng: Random, digits: bool) -> Said:
        number = low + int(rng.random() * (high - low + 1))
        text = written(rng, number, digits)
        return Said(number, text, text)

    return make


def _decimal(low: float, high: float, step: float) -> Everyday:
    def make(rng: Random, digits: bool) -> Said:
        value = round(low + step * int(rng.random() * ((high - low) / step + 1)), 4)
        if rng.random() < 0.55:
            value = round(value)
        value = int(value) if value == int(value) else value
        text = written(rng, value, digits or rng.random() < 0.5) if isinstance(value, int) else str(value)
        return Said(value, text, text)

    return make


def _choice(options: tuple[str, ...]) -> Everyday:
    def make(rng: Random, digits: bool) -> Said:
        text = pick(rng, options)
        return Said(text, text, text)

    return make


def _of_table(name: str) -> Everyday:
    return lambda rng, digits: Said(*table_kind(name).value(rng, TRAIN, {}), "")


_MADE: dict[str, Everyday] = {
    "time": time, "day": day, "date": date, "when": when, "mins": minutes, "number": number, "numbers": _numbers,
    "expression": _expression, "money": money, "foreign": _of_table("foreign"), "clock": _of_table("time"),
    **{name: _verbatim(name) for name in {*LEXICON, *_COMPOSED}},
}  # fmt: skip


def everyday(spec: str) -> Everyday:
    """What draws values of a kind: a list of lexicon.txt, `time`, `day`, `date`, `when`, `mins`, `int:1:9`, `of:on,off` ...

    Raises:
        ValueError: there is no such kind.
    """
    if spec not in _MADE:
        name, _, rest = spec.partition(":")
        if name == "int":
            low, high = map(int, rest.split(":"))
            _MADE[spec] = _integer(low, high)
        elif name == "num":
            numbers = [float(part) for part in rest.split(":")]
            _MADE[spec] = _decimal(numbers[0], numbers[1], numbers[2])
        elif name == "of":
            _MADE[spec] = _choice(tuple(rest.split(",")))
        else:
            raise ValueError(
                f"found the kind {spec!r}, expected a list of lexicon.txt, {sorted(_MADE)}, int:, num: or of:"
            )
    return _MADE[spec]
