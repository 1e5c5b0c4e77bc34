"""The interface of a network that a generation uses, which our networks and mlx-lm's implement; and a generation's task,
for several take turns with one network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from ..experts.store import StoreStats
from .expert_choice import ChoiceCounters
from .prefetch import PrefetchCounters
from .run_ahead import AheadCounters
from .streaming_options import StreamingOptions


class Dimensions(Protocol):
    """The facts of a model that code outside its network uses; see :class:`~flash_moe.config.ModelConfig`."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class Cache(Protocol):
    """The caches of one sequence in all layers; see :class:`~flash_moe.nn.cache.SequenceCache`."""

    tokens: list[int]
    marks: list[int]

    @property
    def nbytes(self) -> int: ...
    @property
    def held(self) -> list[int]:
        """Lengths to which the cache can be cut back now, also after a pass that failed."""

    def mark(self, lengths: Sequence[int]) -> None: ...

    def reach(self, length: int) -> int:
        """Returns the longest length, up to ``length``, to which the cache can be cut back; 0 for none."""

    def cut_back(self, length: int) -> None: ...

    def fork(self, length: int) -> Any: ...

    def recover(self) -> bool: ...

    def undone_on_error(self) -> AbstractContextManager[None]: ...


class Network(Protocol):
    """Runs tokens of one sequence at a time.

    Attributes:
        layers: of which a pass reports each to its task.
        streaming: what is done about experts that are not in memory.
        choice, prefetcher, run_ahead: as :class:`~flash_moe.nn.decoder.Decoder` has them; None for what there is not.
    """

    layers: Any
    streaming: StreamingOptions
    choice: Any
    prefetcher: Any
    run_ahead: Any

    def new_cache(self) -> Any:
        """Returns an empty cache for a new sequence."""

    def serving(self, task: Task) -> AbstractContextManager[None]:
        """Within, what is counted and what can be cancelled is the task's."""

    def chunks(self, tokens: Sequence[int], cache: Any, last: int) -> list[int]:
        """Returns how many tokens go through the layers together in :meth:`run`, one number for each time."""

    def run(self, tokens: Sequence[int], cache: Any, last: int) -> mx.array:
        """Runs further tokens of a sequence, which its cache takes over.

        Args:
            last: how many tokens at the end logits are wanted of.

        Returns:
            [last, V] float32; they may not have been evaluated yet.
        """


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
