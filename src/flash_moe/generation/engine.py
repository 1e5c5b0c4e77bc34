"""Prefill and decode: runs the decoder over a prompt, then token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from threading import RLock
from typing import Any

import mlx.core as mx

from ..closing import UntilClosed
from ..errors import Cancelled
from ..limits import memory_limit
from ..mlx_cache import clear_cache
from ..nn.network import Cache, Network, Task
from ..progress import Callback, Progress
from .sampling import Sampler

CLOSE_SECONDS = 1.0  # that closing waits for the pass that is running
TURN_SECONDS = 0.1  # after which a generation that waits for its turn looks whether it was cancelled
MOST_TOGETHER = 64  # sequences; of more, the experts that a layer reads grow as their number does
CLEAR_INTERVAL = 16  # tokens; MLX keeps freed buffers by size, and a growing context leaves one of every size


class Engine:
    """Runs one decoder; forward passes of several sequences take turns.

    Args:
        decoder: the network.
        prefill_chunk: tokens that go through the layers together; each expert they touch is read once per chunk.
    """

    _decoder = UntilClosed[Network]()
    _turn = UntilClosed[Any]()  # stays: it only must not be waited for in a fork

    def __init__(self, decoder: Network, prefill_chunk: int) -> None:
        self._decoder, self._chunk = decoder, prefill_chunk
        self._turn = RLock()

    def close(self) -> None:
        """Drops the network. Every later pass raises :class:`~flash_moe.errors.ModelClosedError`.

        Waits a moment for the pass that is running, which ends at its next fetch from a store that is closed.
        """
        del self._decoder
        if self._turn.acquire(timeout=CLOSE_SECONDS):
            self._turn.release()

    def new_cache(self) -> Cache:
        """Returns an empty cache for a new sequence."""
        return self._decoder.new_cache()

    def prefill(
        self,
        tokens: Sequence[int],
        cache: Cache,
        progress: Callback | None = None,
        task: Task | None = None,
    ) -> mx.array:
        """Runs what the cache does not hold yet of a prompt through the network.

        Args:
            tokens: the prompt; the cache holds a proper part of its beginning.
            progress: called after each layer of a chunk, with tokens.
            task: the generation it is for.

        Returns:
            Logits [V] float32 of the last token.
        """
        task = task or Task()
        for start in range(len(cache.tokens), len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            with self._telling(progress, task, start, len(chunk), len(tokens)):
                logits = self._run(chunk, cache, int(start + len(chunk) == len(tokens)), task)
        mx.eval(logits)
        clear_cache()  # memory that prefill no longer needs is better used by the page cache
        return logits[0]

    @contextmanager
    def _telling(self, progress: Callback | None, task: Task, start: int, count: int, total: int) -> Iterator[None]:
        """Within it, each layer of a pass over ``count`` tokens is reported."""
        layers = len(self._decoder.layers)

        def passed(number: int) -> None:
            assert progress is not None
            progress(Progress("prompt", start + count * number // layers, total, "tokens"))

        task.passed = None if progress is None else passed
        try:
            yield
        finally:
            task.passed = None

    def decode(
        self, logits: mx.array, cache: Cache, sampler: Sampler, count: int, task: Task | None = None
    ) -> Iterator[int]:
        """Yields up to ``count`` tokens, the first drawn from ``logits``; the caller stops when it has enough."""
        done = cleared = 0
        while True:
            tokens = self.draw(logits, sampler, task)
            yield from tokens
            done += len(tokens)
            if done >= count:
                return
            if done - cleared >= CLEAR_INTERVAL:
                cleared = done
                clear_cache()
            logits = self._run(tokens, cache, 1, task)[0]

    def draw(self, logits: mx.array, sampler: Sampler, task: Task | None = None) -> list[int]:
        """Draws a token from logits [V], and takes those behind it that a format leaves no choice about."""
        sampler.prepare()  # outside the turn, so that others need not wait
        with self._in_turn(task):
            tokens = [sampler(logits)]
            if not self._decoder.streaming.changes_experts:  # which acts on single tokens
                tokens += sampler.forced()
        return tokens

    @property
    def most_together(self) -> int:
        """How many sequences may run together: as many as an eighth of the memory holds, each with marks and keys."""
        if not hasattr(self._decoder, "run_together"):
            return 1
        return max(2, min(MOST_TOGETHER, memory_limit() // 8 // max(1, 3 * self.new_cache().nbytes)))

    def prefill_together(
        self,
        prompts: Sequence[Sequence[int]],
        caches: Sequence[Cache],
        tasks: Sequence[Task],
        progress: Callback | None = None,
    ) -> list[mx.array]:
        """As :meth:`prefill` for several prompts, of which a chunk takes as many as it can.

        Returns:
            Logits [V] float32 of the last token of each.
        """
        left = [list(tokens[len(cache.tokens) :]) for tokens, cache in zip(prompts, caches, strict=True)]
        found: list[Any] = [None] * len(left)
        done, total = 0, sum(map(len, left))
        while any(left):
            room, pieces = self._chunk, {}
            for i, tokens in enumerate(left):
                if piece := tokens[:room]:
                    pieces[i] = piece
                    room -= len(piece)
            own, count = [tasks[i] for i in pieces], self._chunk - room
            with self._telling(progress, own[-1], done, count, total):
                logits = self.run_together([*pieces.values()], [caches[i] for i in pieces], own)
            for (i, piece), row in zip(pieces.items(), logits, strict=True):
                del left[i][: len(piece)]
                found[i] = row
            done += count
        mx.eval(found)
        clear_cache()
        return found

    def run_together(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[Any], tasks: Sequence[Task]
    ) -> list[mx.array]:
        """Returns further tokens of several sequences, through the layers together where the network can.

        Args:
            tasks: the generations that they are for; the pass counts in each.

        Returns:
            Logits [V] float32 of the last token of each.
        """
        network = self._decoder
        together = getattr(network, "run_together", None)
        if len(tokens) == 1 or together is None or network.streaming.changes_experts:  # which acts on single tokens
            return [self._run(t, c, 1, task)[0] for t, c, task in zip(tokens, caches, tasks, strict=True)]
        with self._in_turn(tasks[0]), ExitStack() as serving:
            for task in tasks:
                serving.enter_context(network.serving(task))
            return list(together(tokens, caches))

    def all_logits(self, tokens: Sequence[int]) -> mx.array:
        """Returns logits of every position of a teacher-forced pass, [T, V] float32."""
        return self.last_logits(tokens, len(tokens), self.new_cache())

    def last_logits(self, tokens: Sequence[int], count: int, cache: Cache) -> mx.array:
        """Returns logits of the last ``count`` positions, [count, V] float32; the cache holds at most what lies before
        them.
        """
        parts, first = [], len(tokens) - count
        for start in range(len(cache.tokens), len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            if wanted := min(len(chunk), max(0, start + len(chunk) - first)):
                parts.append(self._run(chunk, cache, wanted))
                mx.eval(parts)
            else:
                self._run(chunk, cache, 0)
        return mx.concatenate(parts)

    def _run(self, tokens: Sequence[int], cache: Cache, last: int, task: Task | None = None) -> mx.array:
        """One pass; logits [last, V] of the last of the tokens."""
        with self._in_turn(task):
            network = self._decoder
            with nullcontext() if task is None else network.serving(task):
                return network.run(tokens, cache, last)

    @contextmanager
    def _in_turn(self, task: Task | None) -> Iterator[None]:
        """Waits for the passes of other sequences, unless the task is cancelled meanwhile."""
        turn, cancelled = self._turn, None if task is None else task.cancelled
        while not turn.acquire(timeout=-1 if cancelled is None else TURN_SECONDS):
            if cancelled is not None and cancelled():
                raise Cancelled("the generation was cancelled while it waited for its turn")
        try:
            yield
        finally:
            turn.release()
