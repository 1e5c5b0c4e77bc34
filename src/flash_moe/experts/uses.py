"""Observers of a store, and a counter of the uses of every expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..amounts import percent
from ..notebook import html
from ..notebook.figures import Picture, layers_of, uses_of
from .fetched import Watcher
from .store_stats import StoreStats


class Watched:
    """The events of a store that observers see."""

    by_layer: Mapping[int, StoreStats]
    _watchers: tuple[Watcher, ...] = ()

    @contextmanager
    def watch(self, used: Watcher) -> Iterator[None]:
        """Calls ``used(layer, experts, missing)`` after each fetch, in the thread that fetched, until the block ends.

        ``missing`` has the bytes of each record that were not in memory. It must return fast and not raise. A layer that
        is fully resident on a GPU is not fetched, and not seen.
        """
        self._watchers = *self._watchers, used
        try:
            yield
        finally:
            self._watchers = tuple(watcher for watcher in self._watchers if watcher is not used)

    def plot(self) -> Picture:
        """Draws how long fetches waited, and what was in memory, by layer. Needs matplotlib, the extra ``plot``."""
        return layers_of(self.by_layer)


class ExpertUses:
    """Counts of fetches of each layer's experts; :meth:`flash_moe.Model.expert_uses` makes one.

    Attributes:
        counts: [L, E] int64, fetches of each expert; a prompt's chunk fetches an expert once for all its tokens.
        bytes_missing: [L, E] int64, bytes that were not in memory.

    Args:
        experts: E, by layer.
    """

    def __init__(self, experts: Mapping[int, int]) -> None:
        shape = max(experts, default=-1) + 1, max(experts.values(), default=0)
        self.counts, self.bytes_missing = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def __call__(self, layer: int, experts: Sequence[int], missing: Sequence[int]) -> None:
        """Counts a fetch."""
        self.counts[layer, list(experts)] += 1
        self.bytes_missing[layer, list(experts)] += np.asarray(missing, np.int64)

    @property
    def concentration(self) -> float:
        """Share of all uses that the most used tenth of each layer's experts takes; 0.1 if all are used alike."""
        most = max(1, self.counts.shape[1] // 10)
        total = int(self.counts.sum())
        return float(np.sort(self.counts, axis=1)[:, -most:].sum() / total) if total else 0.0

    def plot(self) -> Picture:
        """Draws the counts: a row for each layer, its experts from the most used to the least.

        Raises:
            ArgumentError: matplotlib, the extra ``plot``, is not installed.
        """
        return uses_of(self.counts)

    def _rows(self) -> list[tuple[str, str]]:
        used, all_ = int((self.counts > 0).sum()), self.counts.size
        return [
            ("uses", f"{int(self.counts.sum()):,}"),
            ("experts used at all", f"{used:,} of {all_:,} ({percent(used / max(all_, 1))})"),
            ("uses of each layer's most used tenth", percent(self.concentration)),
        ]

    def __repr__(self) -> str:
        return f"ExpertUses({', '.join(f'{name}: {value}' for name, value in self._rows())})"

    def _repr_html_(self) -> str:
        return html.table(self._rows())
