"""Sentences with alternatives: `[Show|Give] me the [weather|forecast] in {city}.`"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TypeAlias

from .splits import pick

Phrase: TypeAlias = "str | tuple[str | tuple[str, ...], ...]"
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_FOLDER = Path(__file__).parent


def phrase(source: str) -> Phrase:
    """Compiles a sentence; without alternatives it is the string itself."""
    parts = _CHOICE.split(source)
    if len(parts) == 1:
        return source
    # re.split puts what the group matched at odd positions.
    return tuple(tuple(part.split("|")) if i % 2 else part for i, part in enumerate(parts) if part)


def phrases(source: str) -> tuple[Phrase, ...]:
    """Compiles sentences separated by semicolons."""
    return tuple(phrase(part.strip()) for part in source.split(";") if part.strip())


def say(rng: Random, compiled: Phrase) -> str:
    """One wording of a phrase; fields such as `{city}` stay."""
    if isinstance(compiled, str):
        return compiled
    return "".join([part if isinstance(part, str) else pick(rng, part) for part in compiled])


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def listing(items: list[str], last: str = "and") -> str:
    """`a, b and c`"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def read_table(name: str) -> Iterator[tuple[str, list[str]]]:
    """Rows of a table of this package: (section, columns); `# ...` begins a section, columns are separated by `|`
    with spaces around it."""
    section = ""
    for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line[1:].strip()
        elif line.strip():
            yield section, [column.strip() for column in line.split(" | ")]
