"""mlx-lm's caches of one sequence. Some can be truncated to any length, others only to a saved copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .library import module


class AdaptedCache:
    """The caches of one sequence, like :class:`~flash_moe.nn.cache.SequenceCache`, for mlx-lm's kinds of caches.

    Plain KV caches can be truncated to any length. Rotating caches and recurrent states are copied at the marks.

    Attributes:
        layers: mlx-lm's caches.
        tokens: the token ids in the caches.
        marks: lengths to which the caches can be truncated, now or when that length is reached.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.tokens, self.marks = layers, list[int](), list[int]()
        self._kept: dict[int, dict[int, Any]] = {}  # copies at each mark of the layers that cannot be truncated
        self._failed = False

    @property
    def sound(self) -> bool:
        """Whether the last pass completed."""
        return not self._failed

    def reach(self, length: int) -> int:
        """Returns the greatest length, at most ``length``, to which the cache can be truncated; 0 if there is none."""
        if not self._uncut:
            return length
        return max((mark for mark in self._kept if mark <= length), default=0)

    def mark(self, lengths: Sequence[int]) -> None:
        """Requests marks at the current length or at greater ones, and drops all other marks."""
        self.marks = sorted(lengths)
        self._kept = {length: kept for length, kept in self._kept.items() if length in lengths}
        self.reached()

    def reached(self) -> None:
        """Keeps copies if a mark is requested at the current length.

        Arrays are copied only when one of them changes.
        """
        length = len(self.tokens)
        if length in self.marks and length not in self._kept:
            self._kept[length] = self._copies()

    def cut_back(self, length: int) -> None:
        """Truncates the cache to ``length``, a result of :meth:`reach`."""
        self._restore(length, self._kept.get(length, {}))
        self.mark([mark for mark in self.marks if mark <= length])

    def fork(self, length: int) -> AdaptedCache:
        """Returns a copy of the cache with the first ``length`` tokens: all of them, or as after :meth:`cut_back`."""
        other = AdaptedCache(copy.deepcopy(self.layers))
        other.tokens, other.marks, other._kept = list(self.tokens), list(self.marks), dict(self._kept)
        if length < len(other.tokens):
            other.cut_back(length)
        return other

    @property
    def held(self) -> list[int]:
        """Returns the lengths to which the cache can be truncated now, ascending; its own if it is sound."""
        length = len(self.tokens)
        reached = [mark for mark in self.marks if mark < length and self.reach(mark) == mark]
        return [*reached, length] if not self._failed or self.reach(length) == length else reached

    def recover(self) -> bool:
        """Repairs a cache after a failed pass: truncates it to a mark. Returns whether the cache is sound."""
        if self._failed and (length := self.reach(len(self.tokens))):
            self.cut_back(length)
        return not self._failed

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Encloses a pass. If the pass does not complete, the cache is marked as not sound."""
        self._failed = True
        yield
        self._failed = False

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Restores the cache if the pass inside the block fails."""
        count, kept = len(self.tokens), self._copies()
        try:
            yield
        except BaseException:
            self._restore(count, kept)
            raise

    @property
    def arrays(self) -> list[mx.array]:
        """Returns all arrays, to evaluate or measure them."""
        return arrays_of(self.layers)

    @property
    def nbytes(self) -> int:
        """The bytes of all layers and marks."""
        kept = [layer for layers in self._kept.values() for layer in layers.values()]
        return sum(array.nbytes for array in arrays_of([*self.layers, *kept]))

    @property
    def _uncut(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if not _can_be_cut(layer)]

    def _copies(self) -> dict[int, Any]:
        return {i: copy.deepcopy(self.layers[i]) for i in self._uncut}

    def _restore(self, length: int, kept: Mapping[int, Any]) -> None:
        for i, layer in enumerate(self.layers):
            if i in kept:
                self.layers[i] = copy.deepcopy(kept[i])
            else:
                _cut(layer, length)
        del self.tokens[length:]
        self._failed = False


def _can_be_cut(layer: Any) -> bool:
    caches = module("models.cache")
    if type(layer) is caches.CacheList:
        return all(_can_be_cut(part) for part in layer.caches)
    return type(layer) is caches.KVCache


def _cut(layer: Any, length: int) -> None:
    for part in getattr(layer, "caches", [layer]):
        part.trim(part.offset - length)


def arrays_of(layers: Sequence[Any]) -> list[mx.array]:
    """Returns the arrays of mlx-lm's caches."""
    states = [layer.state for layer in layers if not (hasattr(layer, "empty") and layer.empty())]
    return [array for _, array in tree_flatten(states) if isinstance(array, mx.array)]
