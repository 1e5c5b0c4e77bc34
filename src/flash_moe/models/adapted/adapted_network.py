"""A network of mlx-lm with the interface that generation uses."""

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
        layers: the layers of mlx-lm's network. store: the store of the experts.
        streaming, prefetcher, choice, run_ahead: as in the decoder, but all off, because they need our own router.
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
        """Inside the block, every pass belongs to this task: it updates the task's counters and ends when the task is
        cancelled.
        """
        with self.store.counting(task.store):
            try:
                self.store.stop_if(task.cancelled)
                self._passed = task.passed
                yield
            finally:
                self._passed = self._shared.passed = None
                self.store.stop_if(None)

    def join(self, sums: Sums) -> None:
        """Joins a group: from now on, computes only the experts of one share, and gets the others from other machines."""
        self._shared.sums = sums

    def chunks(self, tokens: Sequence[int], cache: AdaptedCache, last: int) -> list[int]:
        """Returns the chunks of :meth:`run`: the numbers of tokens that pass through the layers together."""
        first, count = len(cache.tokens), len(tokens)
        ends = {count - last, count, *(mark - first for mark in cache.marks)}
        inner = sorted(end for end in ends if 0 < end <= count)
        return [end - start for start, end in zip([0, *inner], inner, strict=False)]

    def run(self, tokens: Sequence[int], cache: AdaptedCache, last: int) -> mx.array:
        """Runs T further tokens of a sequence, and adds them to ``cache.tokens``.

        Tokens whose logits are not needed run separately, because mlx-lm computes the logits of all tokens of a pass.

        Returns:
            The logits [last, V] float32 of the last tokens. They and the cache are evaluated.
        """
        wanted, start, found = len(tokens) - last, 0, []
        # For a single token, copies would take too long.
        undo = cache.undone_on_error() if len(tokens) > 1 else nullcontext()
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
        """Makes expert modules report progress while the tokens ``start`` to ``end`` of ``count`` run, as layers do."""
        passed, layers, modules = self._passed, len(self.layers), len(self.store.layouts)
        if passed is not None:
            self._shared.passed = lambda done: passed(
                layers * (start * modules + (end - start) * done) // (count * modules)
            )
