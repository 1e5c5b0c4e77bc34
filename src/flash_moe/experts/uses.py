"""Observers of a store, and counters of the uses of every expert."""

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
    """A store that reports its fetches to observers."""

    by_layer: Mapping[int, StoreStats]
    _watchers: tuple[Watcher, ...] = ()

    @contextmanager
    def watch(self, used: Watcher) -> Iterator[None]:
        """Calls ``used(layer, experts, missing)`` after each fetch, in the thread that fetched, until the block ends.

        ``missing`` gives the bytes of each record that were not in memory. ``used`` must return quickly and must not
        raise. Layers that are fully resident on a GPU are not fetched, so they are not reported.
        """
        self._watchers = *self._watchers, used
        try:
            yield
        finally:
            self._watchers = tuple(watcher for watcher in self._watchers if watcher is not used)

    def plot(self) -> Picture:
        """Plots the waiting time of fetches and the share in memory, by layer.

        It needs matplotlib, the extra ``plot``.
        """
        return layers_of(self.by_layer)


class ExpertUses:
    """The number of fetches of each expert of each layer, from :meth:`flash_moe.Model.expert_uses`.

    Attributes:
        counts: [L, E] int64, number of fetches of each expert. A chunk of a prompt fetches an expert once for all its
            tokens.
        bytes_missing: [L, E] int64, fetched bytes that were not in memory.

    Args:
        experts: number of experts E of each layer.
    """

    def __init__(self, experts: Mapping[int, int]) -> None:
        shape = max(experts, default=-1) + 1, max(experts.values(), default=0)
        self.counts, self.bytes_missing = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def __call__(self, layer: int, experts: Sequence[int], missing: Sequence[int]) -> None:
        """Adds a fetch to the counts."""
        self.counts[layer, list(experts)] += 1
        self.bytes_missing[layer, list(experts)] += np.asarray(missing, np.int64)

    @property
    def concentration(self) -> float:
        """Returns the share of uses of each layer's most used tenth of experts; 0.1 if all are used equally."""
        most = max(1, self.counts.shape[1] // 10)
        total = int(self.counts.sum())
        return float(np.sort(self.counts, axis=1)[:, -most:].sum() / total) if total else 0.0

    def plot(self) -> Picture:
        """Plots the counts with a row per layer, and its experts from the most to the least used.

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
