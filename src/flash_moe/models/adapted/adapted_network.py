"""A network of mlx-lm behind the interface that generation uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx

from ...experts.store import ExpertStore
from ...machines.sums import Sums
from ...nn.network import Task
from ...nn.streaming_options import PLAIN, StreamingOptions
from .adapted_cache import AdaptedCache
from .library import module
from .switches import Shared


class AdaptedNetwork:
    """Runs mlx-lm's network; counterpart of :class:`~flash_moe.nn.decoder.Decoder`.

    Attributes:
        layers: mlx-lm's own; store: where the experts come from.
        streaming, prefetcher, choice, run_ahead: as the decoder's, all off: they need a router of our own.
    """

    streaming: StreamingOptions = PLAIN
    prefetcher = choice = run_ahead = None

    def __init__(self, model: Any, store: ExpertStore, shared: Shared) -> None:
        self.model, self.layers, self.store, self._shared = model, model.layers, store, shared
        self._passed: Callable[[int], None] | None = None

    def new_cache(self) -> AdaptedCache:
        """Returns an empty cache for a new sequence."""
        return AdaptedCache(module("models.cache").make_prompt_cache(self.model))

    @contextmanager
    def serving(self, task: Task) -> Iterator[None]:
        """Within it all passes are for this task: they count in its counters, and end when it is cancelled."""
        with self.store.counting(task.store):
            try:
                self.store.stop_if(task.cancelled)
                self._passed = task.passed
                yield
            finally:
                self._passed = self._shared.passed = None
                self.store.stop_if(None)

    def join(self, sums: Sums) -> None:
        """Computes the experts of one share from now on, and takes the others from other machines."""
        self._shared.sums = sums

    def chunks(self, tokens: Sequence[int], cache: AdaptedCache, last: int) -> list[int]:
        """Returns how many tokens go through the layers together in :meth:`run`, one number for each time."""
        first, count = len(cache.tokens), len(tokens)
        ends = {count - last, count, *(mark - first for mark in cache.marks)}
        inner = sorted(end for end in ends if 0 < end <= count)
        return [end - start for start, end in zip([0, *inner], inner, strict=False)]

    def run(self, tokens: Sequence[int], cache: AdaptedCache, last: int) -> mx.array:
        """Runs T more tokens of a sequence; they are added to ``cache.tokens``.

        Tokens whose logits are not wanted run by themselves, since mlx-lm makes logits of all that run together.

        Returns:
            Logits [last, V] float32 of the last ones. They and the cache have been evaluated.
        """
        wanted, start, found = len(tokens) - last, 0, []
        undo = cache.undone_on_error() if len(tokens) > 1 else nullcontext()  # of one token, copies would cost too much
        with undo, cache.passing():
            for count in self.chunks(tokens, cache, last):
                end = start + count
                self._tell(start, end, len(tokens))
                logits = self.model(mx.array([list(tokens[start:end])]), cache=cache.layers)[0]
                if end > wanted:
                    found.append(logits.astype(mx.float32))
                mx.eval(found[-1:], cache.arrays)
                cache.tokens.extend(tokens[start:end])
                cache.reached()
                start = end
        return mx.concatenate(found) if found else mx.zeros((0, 0))

    def _tell(self, start: int, end: int, count: int) -> None:
        """Has expert modules report, while the tokens from ``start`` to ``end`` of ``count`` run, as layers are asked to."""
        passed, layers, modules = self._passed, len(self.layers), len(self.store.layouts)
        if passed is not None:
            self._shared.passed = lambda done: passed(
                layers * (start * modules + (end - start) * done) // (count * modules)
            )
