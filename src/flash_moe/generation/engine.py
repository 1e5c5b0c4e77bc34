"""Runs a network: prefill of a prompt in chunks, then decoding token by token."""

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

CLOSE_SECONDS = 1.0  # seconds that closing waits for the running pass
TURN_SECONDS = 0.1  # seconds after which a waiting generation checks whether it was cancelled
MOST_TOGETHER = 64  # sequences; with more, the experts that a layer reads grow in proportion
CLEAR_INTERVAL = 16  # tokens; MLX keeps freed buffers by size, and a growing context frees one of each size


class Engine:
    """Runs one network. The forward passes of several sequences take turns.

    Args:
        decoder: the network.
        prefill_chunk: number of prompt tokens that pass through the layers together. Each expert that they use is read
            once per chunk.
    """

    _decoder = UntilClosed[Network]()
    _turn = UntilClosed[Any]()  # stays open; a fork must not wait for it

    def __init__(self, decoder: Network, prefill_chunk: int) -> None:
        self._decoder, self._chunk = decoder, prefill_chunk
        self._turn = RLock()

    def close(self) -> None:
        """Releases the network. Every later pass raises :class:`~flash_moe.errors.ModelClosedError`.

        Waits briefly for the running pass, which ends at its next fetch, because the store is closed.
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
        """Runs the tokens of a prompt that are not in the cache yet.

        Args:
            tokens: the whole prompt. The cache holds a prefix of it, but not all of it.
            progress: function that is called after each layer of a chunk, with a number of tokens.
            task: the generation that the prompt belongs to.

        Returns:
            Logits [V] float32 of the last token.
        """
        task = task or Task()
        for start in range(len(cache.tokens), len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            with self._telling(progress, task, start, len(chunk), len(tokens)):
                logits = self._run(chunk, cache, int(start + len(chunk) == len(tokens)), task)
        mx.eval(logits)
        clear_cache()  # the page cache can use the memory that prefill no longer needs
        return logits[0]

    @contextmanager
    def _telling(self, progress: Callback | None, task: Task, start: int, count: int, total: int) -> Iterator[None]:
        """Reports the progress of each layer during a pass over ``count`` tokens."""
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
        """Yields up to ``count`` tokens; the first is sampled from ``logits``. The caller may stop early."""
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
        """Samples a token from logits [V], and adds the tokens that the format forces after it."""
        sampler.prepare()  # before the turn, so that other sequences need not wait
        with self._in_turn(task):
            tokens = [sampler(logits)]
            if not self._decoder.streaming.changes_experts:  # these options act on single tokens
                tokens += sampler.forced()
        return tokens

    @property
    def most_together(self) -> int:
        """The maximum number of sequences that run together; their caches take at most an eighth of the memory."""
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
        """Runs several prompts as :meth:`prefill` does. A chunk holds tokens of as many prompts as possible.

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
        """Runs the next tokens of several sequences together, if the network supports that.

        Args:
            tasks: the generations that the sequences belong to; the pass counts in the statistics of each.

        Returns:
            Logits [V] float32 of the last token of each.
        """
        network = self._decoder
        together = getattr(network, "run_together", None)
        if (
            len(tokens) == 1 or together is None or network.streaming.changes_experts
        ):  # these options act on single tokens
            return [self._run(t, c, 1, task)[0] for t, c, task in zip(tokens, caches, tasks, strict=True)]
        with self._in_turn(tasks[0]), ExitStack() as serving:
            for task in tasks:
                serving.enter_context(network.serving(task))
            return list(together(tokens, caches))

    def all_logits(self, tokens: Sequence[int]) -> mx.array:
        """Runs a sequence and returns the logits of every position, [T, V] float32."""
        return self.last_logits(tokens, len(tokens), self.new_cache())

    def last_logits(self, tokens: Sequence[int], count: int, cache: Cache) -> mx.array:
        """Returns the logits of the last ``count`` positions, [count, V] float32.

        The cache holds at most the tokens before them.
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
        """Runs one pass and returns the logits [last, V] of the last tokens."""
        with self._in_turn(task):
            network = self._decoder
            with nullcontext() if task is None else network.serving(task):
                return network.run(tokens, cache, last)

    @contextmanager
    def _in_turn(self, task: Task | None) -> Iterator[None]:
        """Waits for the passes of other sequences. Raises Cancelled if the task is cancelled meanwhile."""
        turn, cancelled = self._turn, None if task is None else task.cancelled
        while not turn.acquire(timeout=-1 if cancelled is None else TURN_SECONDS):
            if cancelled is not None and cancelled():
                raise Cancelled("the generation was cancelled while it waited for its turn")
        try:
            yield
        finally:
            turn.release()
