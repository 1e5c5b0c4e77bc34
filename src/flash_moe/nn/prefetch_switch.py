"""Decides in trials whether prefetching saves time: times tokens with and without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decision = Literal["nothing to load", "measuring", "on", "off"]

PHASE = 8  # tokens
ORDER = (False, True, True, False)  # alternating, so that neither side benefits from caches that fill meanwhile
TRIAL = PHASE * len(ORDER)  # tokens
QUIET = 8  # consecutive tokens without loads, after which predictions are pointless
RECHECK = 1000  # tokens after which a decision is tested again
GAIN = 0.02  # minimum share of the time that prefetching must save


@dataclass(frozen=True)
class Comparison:
    """The means per token of one trial.

    Attributes:
        seconds, seconds_without: seconds of the network, with and without prefetching.
        missing, missing_without: missing expert bytes, with and without prefetching. They are about the same if the
            trial was fair.
    """

    seconds: float
    seconds_without: float
    missing: float
    missing_without: float

    @property
    def saved(self) -> float:
        """The share of the time per token that prefetching saved; negative if it was slower."""
        return 1 - self.seconds / self.seconds_without if self.seconds_without else 0.0


class PrefetchSwitch:
    """Turns prefetching on if a trial showed a gain, and off otherwise or if no expert has to be loaded.

    Attributes:
        compared: the last completed trial; None before the first.
    """

    def __init__(self) -> None:
        self.compared: Comparison | None = None
        self._pays = False
        self._quiet = QUIET
        self._trial: list[tuple[float, int]] | None = []  # seconds and missing bytes; None after the decision
        self._age = 0

    @property
    def on(self) -> bool:
        """Whether experts are predicted for the next token."""
        if self._quiet >= QUIET:
            return False
        return self._pays if self._trial is None else ORDER[len(self._trial) // PHASE]

    @property
    def decision(self) -> Decision:
        """Returns the current decision."""
        if self._quiet >= QUIET:
            return "nothing to load"
        if self._trial is not None:
            return "measuring"
        return "on" if self._pays else "off"

    def record(self, seconds: float, missing: int, loaded: int) -> None:
        """Records a token: its seconds, the missing bytes of its experts, and all bytes read or copied for it."""
        if self._quiet < QUIET:
            self._count(seconds, missing)
        self._quiet = 0 if loaded else self._quiet + 1

    def _count(self, seconds: float, missing: int) -> None:
        if self._trial is None:
            self._age += 1
            if self._age == RECHECK:
                self._trial, self._age = [], 0
            return
        self._trial.append((seconds, missing))
        if len(self._trial) == TRIAL:
            self.compared = _compare(self._trial)
            self._pays, self._trial = self.compared.saved >= GAIN, None


def _compare(trial: list[tuple[float, int]]) -> Comparison:
    means = {}
    for side in (True, False):
        tokens = [token for number, token in enumerate(trial) if ORDER[number // PHASE] is side]
        means[side] = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    return Comparison(means[True][0], means[False][0], means[True][1], means[False][1])
