"""Statistics of the streaming options in one generation: prefetching, dropping, preferring cached experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..nn.expert_choice import ChoiceCounters
from ..nn.network import Network, Task
from ..nn.prefetch_switch import Comparison, Decision


@dataclass(frozen=True)
class PrefetchStats:
    """Prefetching for the next layer.

    Attributes:
        decision: what holds now: ``"on"`` or ``"off"`` after a trial, ``"measuring"`` in one, ``"nothing to load"``
            where no expert had to be read, nor copied out of the page cache, lately.
        tokens: decoded tokens for which experts were predicted.
        recall: share of the experts needed there (after the first layer) that had been predicted; None without tokens.
        bytes_unused: wasted bytes: read from outside memory for experts that were not used.
        trial: the last trial that ended, perhaps in an earlier generation; None before the first.
        time_saved: share of the time per token that prefetching saved in it; negative if it cost some.
    """

    decision: Decision
    tokens: int
    recall: float | None
    bytes_unused: int
    trial: Comparison | None
    time_saved: float | None

    def __str__(self) -> str:
        details = []
        if self.recall is not None:
            details.append(f"{self.recall:.0%} of experts predicted")
        if self.time_saved is not None:
            details.append(f"{abs(self.time_saved):.0%} {'less' if self.time_saved >= 0 else 'more'} time per token")
        return f"prefetch {self.decision}" + (f" ({', '.join(details)})" if details else "")


@dataclass(frozen=True)
class ChoiceStats:
    """Experts that were not used though the router chose them; decoding only.

    Attributes:
        routed: experts that the router chose.
        dropped: those that were left out. swapped: those whose place another expert took.
        router_mass_dropped: share of the chosen experts' router probability that was left out.
        router_mass_swapped: share of it that swaps lost.
    """

    routed: int
    dropped: int
    swapped: int
    router_mass_dropped: float
    router_mass_swapped: float

    @classmethod
    def of(cls, counters: ChoiceCounters) -> ChoiceStats:
        """Returns the counters, with masses as shares."""
        mass = counters.routed_mass or 1.0
        return cls(
            counters.routed,
            counters.dropped,
            counters.swapped,
            counters.dropped_mass / mass,
            counters.swapped_mass / mass,
        )

    def __str__(self) -> str:
        found = (
            ("dropped", self.dropped, self.router_mass_dropped),
            ("swapped", self.swapped, self.router_mass_swapped),
        )
        parts = [
            f"{count / self.routed:.1%} of experts {what} (-{mass:.2%} of router mass)"
            for what, count, mass in found
            if count
        ]
        return ", ".join(parts) or "no expert dropped or swapped"


@dataclass(frozen=True)
class AheadStats:
    """Tokens that ran through all layers before the host knew their experts, where a bank on a GPU keeps experts.

    Attributes:
        decision: ``"on"`` if the next token runs ahead, else ``"off"``.
        tokens, waited: decoded tokens that ran ahead, and those that waited for the host in every layer.
        clean: those of the first whose experts were all loaded.
        restarts: layers behind which tokens ran ahead again, since one of their experts had to be read.
        token_seconds, waiting_seconds: of a token that ran ahead, and of one that waited, when last measured; None before.
    """

    decision: Literal["on", "off"]
    tokens: int
    waited: int
    clean: int
    restarts: int
    token_seconds: float | None
    waiting_seconds: float | None

    def __str__(self) -> str:
        share = f" ({self.clean / self.tokens:.0%} without a miss)" if self.tokens else ""
        return f"{self.tokens} of {self.tokens + self.waited} tokens ran ahead{share}"


class StreamingRecorder:
    """Makes statistics of a task's counters, where the decoder has these options on."""

    def __init__(self, decoder: Network, task: Task) -> None:
        self._switch = None if decoder.prefetcher is None else decoder.prefetcher.switch
        self._chooses, self._task = decoder.choice is not None, task
        self._ahead = None if decoder.run_ahead is None else decoder.run_ahead.switch

    @property
    def prefetch(self) -> PrefetchStats | None:
        """None where the option is off."""
        if self._switch is None:
            return None
        counted, trial = self._task.prefetch, self._switch.compared
        return PrefetchStats(
            decision=self._switch.decision,
            tokens=counted.tokens,
            recall=counted.found / counted.needed if counted.needed else None,
            bytes_unused=self._task.store.bytes_unused,
            trial=trial,
            time_saved=None if trial is None else trial.saved,
        )

    @property
    def ahead(self) -> AheadStats | None:
        """None where no bank on a GPU keeps experts."""
        if self._ahead is None:
            return None
        counted, seconds = self._task.ahead, self._ahead.seconds
        return AheadStats(
            "on" if self._ahead.ahead else "off", counted.ahead, counted.waited, counted.clean, counted.restarts,
            seconds.get(True), seconds.get(False),
        )  # fmt: skip

    @property
    def choice(self) -> ChoiceStats | None:
        """None where both options are off."""
        return ChoiceStats.of(self._task.choice) if self._chooses else None
