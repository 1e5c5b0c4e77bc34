"""The interface between generation and networks: Network, its caches, and the task of a generation."""

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
    """The dimensions of a model that code outside its network uses; see :class:`~flash_moe.config.ModelConfig`."""

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
        """Returns the lengths to which the cache can be truncated now, even after a failed pass."""

    def mark(self, lengths: Sequence[int]) -> None: ...

    def reach(self, length: int) -> int:
        """Returns the greatest length, at most ``length``, to which the cache can be truncated; 0 if there is none."""

    def cut_back(self, length: int) -> None: ...

    def fork(self, length: int) -> Any: ...

    def recover(self) -> bool: ...

    def undone_on_error(self) -> AbstractContextManager[None]: ...


class Network(Protocol):
    """Runs tokens of one sequence at a time.

    Attributes:
        layers: the layers; a pass reports each of them to its task.
        streaming: options for experts that are not in memory.
        choice, prefetcher, run_ahead: as in :class:`~flash_moe.nn.decoder.Decoder`; None for features that the network
            does not have.
    """

    layers: Any
    streaming: StreamingOptions
    choice: Any
    prefetcher: Any
    run_ahead: Any

    def new_cache(self) -> Any:
        """Returns an empty cache for a new sequence."""

    def serving(self, task: Task) -> AbstractContextManager[None]:
        """Inside the block, every pass belongs to this task: it updates the task's counters and ends when the task is
        cancelled.
        """

    def chunks(self, tokens: Sequence[int], cache: Any, last: int) -> list[int]:
        """Returns the chunks of :meth:`run`: the numbers of tokens that pass through the layers together."""

    def run(self, tokens: Sequence[int], cache: Any, last: int) -> mx.array:
        """Runs further tokens of a sequence, and adds them to its cache.

        Args:
            last: number of tokens at the end whose logits are returned.

        Returns:
            The logits [last, V] float32, which may not be evaluated yet.
        """


@dataclass
class Task:
    """The counters of one generation's forward passes, and its cancellation.

    Attributes:
        store, prefetch, choice, ahead: counters of this task only.
        cancelled: function that is called in every layer and during waits for reads. If it returns True, the pass ends
            with :class:`~flash_moe.errors.Cancelled`.
        passed: function that is called after each layer with the number of layers that the pass has completed. If it
            raises an exception, the pass fails.
    """

    store: StoreStats = field(default_factory=StoreStats)
    prefetch: PrefetchCounters = field(default_factory=PrefetchCounters)
    choice: ChoiceCounters = field(default_factory=ChoiceCounters)
    ahead: AheadCounters = field(default_factory=AheadCounters)
    cancelled: Callable[[], bool] | None = None
    passed: Callable[[int], None] | None = None
