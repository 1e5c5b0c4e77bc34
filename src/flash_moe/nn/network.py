"""What a generation needs of a network, ours or another's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import mlx.core as mx

from .streaming import StreamingOptions
from .task import Task


class Network(Protocol):
    """Runs tokens of one sequence at a time.

    Its caches have what :class:`~flash_moe.nn.cache.SequenceCache` has: the ``tokens`` that they stand for, the lengths to
    which they can be cut back, and their bytes.

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
        """An empty cache for a new sequence."""

    def serving(self, task: Task) -> AbstractContextManager[None]:
        """Within, what is counted and what can be cancelled is the task's."""

    def run(self, tokens: Sequence[int], cache: Any, last: int) -> mx.array:
        """Runs further tokens of a sequence, which its cache takes over.

        Args:
            last: logits are wanted of so many tokens at the end.

        Returns:
            [last, V] float32; they may not have been evaluated yet.
        """
