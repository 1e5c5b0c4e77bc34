"""Statistics of the streaming options: prefetching, dropping, preferring cached experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..nn.expert_choice import ChoiceCounters
from ..nn.network import Network, Task
from ..nn.prefetch_switch import Comparison, Decision


@dataclass(frozen=True)
class PrefetchStats:
    """The statistics of prefetching for the next layer.

    Attributes:
        decision: the current state: ``"on"`` or ``"off"`` after a trial, ``"measuring"`` during a trial, or ``"nothing
            to load"`` if recent tokens neither read experts nor copied them from the page cache.
        tokens: number of decoded tokens for which experts were predicted.
        recall: share of the experts that these tokens needed (after the first layer) and that were predicted; None if
            there are no such tokens.
        bytes_unused: wasted bytes, i.e. bytes read from files for experts that were not used.
        trial: the last completed trial, possibly of an earlier generation; None before the first.
        time_saved: share of the time per token that prefetching saved in that trial; negative if prefetching was
            slower.
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
    """The statistics of experts that the router chose but that were not used, in decoding.

    Attributes:
        routed: number of experts that the router chose.
        dropped: number of experts that were left out. swapped: number of experts that were replaced by others.
        router_mass_dropped: share of the router probability of the chosen experts that dropping left out.
        router_mass_swapped: share of this probability that swaps lost.
    """

    routed: int
    dropped: int
    swapped: int
    router_mass_dropped: float
    router_mass_swapped: float

    @classmethod
    def of(cls, counters: ChoiceCounters) -> ChoiceStats:
        """Returns the statistics for counters, with probabilities as shares."""
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
    """The statistics of running ahead, for a bank on a GPU that keeps experts between tokens.

    Attributes:
        decision: ``"on"`` if the next token runs ahead, else ``"off"``.
        tokens, waited: numbers of decoded tokens that ran ahead, and that waited for the host in every layer.
        clean: number of tokens that ran ahead and found all their experts loaded.
        restarts: number of layers from which tokens that ran ahead had to continue again, because an expert had to be
            read.
        token_seconds, waiting_seconds: the last measured seconds of a token that ran ahead, and of a token that waited;
            None before the first measurement.
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
    """Computes statistics from the counters of a task, for options that are on."""

    def __init__(self, decoder: Network, task: Task) -> None:
        self._switch = None if decoder.prefetcher is None else decoder.prefetcher.switch
        self._chooses, self._task = decoder.choice is not None, task
        self._ahead = None if decoder.run_ahead is None else decoder.run_ahead.switch

    @property
    def prefetch(self) -> PrefetchStats | None:
        """Returns the statistics of prefetching; None if it is off."""
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
        """Returns the statistics of running ahead; None if no bank on a GPU keeps experts."""
        if self._ahead is None:
            return None
        counted, seconds = self._task.ahead, self._ahead.seconds
        return AheadStats(
            "on" if self._ahead.ahead else "off", counted.ahead, counted.waited, counted.clean, counted.restarts,
            seconds.get(True), seconds.get(False),
        )  # fmt: skip

    @property
    def choice(self) -> ChoiceStats | None:
        """Returns the statistics of dropped and swapped experts; None if both options are off."""
        return ChoiceStats.of(self._task.choice) if self._chooses else None
