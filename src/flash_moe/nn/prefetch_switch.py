"""Decides by trial whether prefetching saves time: tokens with it against tokens without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decision = Literal["nothing to load", "measuring", "on", "off"]

PHASE = 8  # tokens
ORDER = (False, True, True, False)  # so that neither side gains from caches that fill up meanwhile
TRIAL = PHASE * len(ORDER)  # tokens
QUIET = 8  # tokens in a row for which nothing was loaded, after which there is nothing to predict for
RECHECK = 1000  # tokens after which a decision is measured again
GAIN = 0.02  # share of the time that prefetching has to save


@dataclass(frozen=True)
class Comparison:
    """Means per token of one trial.

    Attributes:
        seconds, seconds_without: of the network, with prefetching and without.
        missing, missing_without: expert bytes that had to be read, with prefetching and without: about the same in both
            if the trial was fair.
    """

    seconds: float
    seconds_without: float
    missing: float
    missing_without: float

    @property
    def saved(self) -> float:
        """Share of the time per token that prefetching saved; negative if it cost some."""
        return 1 - self.seconds / self.seconds_without if self.seconds_without else 0.0


class PrefetchSwitch:
    """On where a trial showed a gain, off where it did not or where no expert has to be loaded.

    Attributes:
        compared: the last trial that was finished; None before.
    """

    def __init__(self) -> None:
        self.compared: Comparison | None = None
        self._pays = False
        self._quiet = QUIET
        self._trial: list[tuple[float, int]] | None = []  # seconds and missing bytes; None once it is decided
        self._age = 0

    @property
    def on(self) -> bool:
        """Whether experts are predicted for the next token."""
        if self._quiet >= QUIET:
            return False
        return self._pays if self._trial is None else ORDER[len(self._trial) // PHASE]

    @property
    def decision(self) -> Decision:
        """Returns the present decision."""
        if self._quiet >= QUIET:
            return "nothing to load"
        if self._trial is not None:
            return "measuring"
        return "on" if self._pays else "off"

    def record(self, seconds: float, missing: int, loaded: int) -> None:
        """Counts a token: its seconds, the missing bytes of its experts, and all bytes that were read or copied for it."""
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
