"""The generation that a forward pass belongs to; several generations take turns with one network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..experts.store import StoreStats
from .expert_choice import ChoiceCounters
from .prefetch import PrefetchCounters
from .run_ahead import AheadCounters


@dataclass
class Task:
    """The counters of one generation's forward passes, and its cancellation.

    Attributes:
        store, prefetch, choice, ahead: counters of this task alone.
        cancelled: asked by every layer, and while it waits for reads; where it says yes, the pass ends with
            :class:`~flash_moe.errors.Cancelled`.
        passed: called with the number of layers that a pass has gone through, after each; a pass that it ends by an
            exception fails.
    """

    store: StoreStats = field(default_factory=StoreStats)
    prefetch: PrefetchCounters = field(default_factory=PrefetchCounters)
    choice: ChoiceCounters = field(default_factory=ChoiceCounters)
    ahead: AheadCounters = field(default_factory=AheadCounters)
    cancelled: Callable[[], bool] | None = None
    passed: Callable[[int], None] | None = None
