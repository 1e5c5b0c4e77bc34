"""The vocabulary that conversations are made of: word lists of our own, and pseudo-words without end."""

from __future__ import annotations

from pathlib import Path
from random import Random

from .splits import Words, belongs, pick


def _read() -> dict[str, Words]:
    lines = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    return {name[2:]: Words(words.split()) for name, words in zip(lines[::2], lines[1::2], strict=True)}


WORDS = _read()


def _syllable(rng: Random) -> str:
    coda = pick(rng, WORDS["codas"].every) if rng.random() < 0.6 else ""
    return pick(rng, WORDS["onsets"].every) + pick(rng, WORDS["vowels"].every) + coda


def pseudo_word(rng: Random, split: str) -> str:
    """A pronounceable lower-case word of one to three syllables that means nothing: `zorvex`, `prandel`.

    The two splits never share one.
    """
    while True:
        made = _syllable(rng)
        if len(made) < 4 or rng.random() < 0.6:
            made += _syllable(rng)
            if rng.random() < 0.25:
                made += _syllable(rng)
        if belongs(made, split):
            return made


def word(rng: Random, split: str, kind: str, pseudo: float = 0.2) -> str:
    """A word from a list, or with probability ``pseudo`` a made-up one (capitalised if the list's words are)."""
    words = WORDS[kind]
    if rng.random() < pseudo:
        made = pseudo_word(rng, split)
        return made.capitalize() if words.every[0][0].isupper() else made
    return words.value(rng, split)


def new_name(rng: Random, split: str, kind: str, pseudo: float = 0.2) -> str:
    """A word used as a name in a schema: in the held-out data never one that training sees."""
    if rng.random() >= pseudo and (found := WORDS[kind].name(rng, split)):
        return found
    return pseudo_word(rng, split)
