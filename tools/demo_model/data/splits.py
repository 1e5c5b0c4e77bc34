"""Which words belong to training and which to the held-out data.

A name is held out by its spelling alone, so the two splits cannot overlap, whatever the generators draw.
"""

from __future__ import annotations

import re
from binascii import crc32
from collections.abc import Sequence
from random import Random

TRAIN, HELD_OUT = "train", "held-out"
_IGNORED = re.compile(r"[^a-z0-9]+")


def is_held_out(name: str) -> bool:
    """Whether a name, in whatever case and style (`add_event`, `addEvent`), belongs to the held-out data: one in ten."""
    return crc32(_IGNORED.sub("", name.lower()).encode()) % 10 == 8


def belongs(name: str, split: str) -> bool:
    """Whether a name may appear in ``split``."""
    return is_held_out(name) == (split == HELD_OUT)


def pick(rng: Random, items: Sequence):
    """A random element; several times faster than ``rng.choice``."""
    return items[int(rng.random() * len(items))]


class Words:
    """A list of words, split: training sees nine in ten, and the held-out data also the rest.

    Attributes:
        train: what training may use. every: all. held_out: those that training never sees.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.every = tuple(words)
        self.train = tuple(w for w in words if not is_held_out(w))
        self.held_out = tuple(w for w in words if is_held_out(w))

    def value(self, rng: Random, split: str) -> str:
        """A word used as a value: in the held-out data half of them were never seen."""
        if split == TRAIN:
            return pick(rng, self.train)
        return pick(rng, self.held_out if self.held_out and rng.random() < 0.5 else self.every)

    def name(self, rng: Random, split: str) -> str | None:
        """A word used as a name: in the held-out data never one of training; None if there is none."""
        words = self.train if split == TRAIN else self.held_out
        return pick(rng, words) if words else None
