"""Runs several generations together, so that the experts of a layer are read once for all of them.

The common prefix of prompts runs once. As many sequences run as memory allows. When half of them have ended, the next
sequences begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Cancelled
from ..mlx_cache import clear_cache
from ..progress import Callback, Progress, ProgressOption, following
from .engine import CLEAR_INTERVAL, Engine
from .prefixes import Prefixes, shared
from .result import Chunk
from .run import Request, TokenText, Writer
from .stats import Recorder

_SHARED = 16  # tokens; a separate pass for a shorter prefix would take more time than it saves


@dataclass
class _Sequence:
    """One of several generations that run together."""

    request: Request
    recorder: Recorder
    writer: Writer
    cache: Any = None
    logits: Any = None
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def tokens(self) -> Sequence[int]:
        return self.request.tokens

    @property
    def ended(self) -> bool:
        """Returns whether the reply is complete."""
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None


def generate_together(
    engine: Engine,
    prefixes: Prefixes,
    tokenizer: TokenText,
    requests: Sequence[Request],
    record: Callable[[Request], Recorder],
    progress: ProgressOption,
) -> list[list[Chunk]]:
    """Returns the chunks of each request, in order. If one request is cancelled, all of them end.

    Bytes that are read for several sequences count in the statistics of each of them.
    """
    with following(progress) as report:

        def begun(request: Request) -> _Sequence:
            recorder = record(request)
            recorder.task.cancelled = request.cancelled
            return _Sequence(request, recorder, Writer(tokenizer, request, recorder))

        batch = _Batch(engine, prefixes, requests, begun, report)
        try:
            batch.run()
        except Cancelled:
            if not any(request.cancelled is not None and request.cancelled() for request in requests):
                raise
            batch.begin(len(requests))
            for sequence in batch.sequences:
                if not sequence.ended:
                    sequence.chunks.append(sequence.writer.cancelled())
        finally:
            for sequence in batch.sequences:
                batch.keep(sequence)
    return [sequence.chunks for sequence in batch.sequences]


class _Batch:
    """The sequences of one call of :func:`generate_together`.

    Args:
        begun: function that creates a sequence and starts its clock.

    Attributes:
        sequences: the sequences that have begun, in order.
    """

    def __init__(
        self,
        engine: Engine,
        prefixes: Prefixes,
        requests: Sequence[Request],
        begun: Callable[[Request], _Sequence],
        report: Callback | None,
    ) -> None:
        self._engine, self._prefixes, self._begun, self._report = engine, prefixes, begun, report
        self._waiting, self._total = deque(requests), len(requests)
        self.sequences: list[_Sequence] = []

    def run(self) -> None:
        """Runs all requests until they end."""
        active: list[_Sequence] = []
        most, steps = self._engine.most_together, 0
        while active or self._waiting:
            if self._waiting and len(active) <= most // 2:
                new = self.begin(most - len(active))
                self._prefill(new)
                active += new
            active = self._step(active)
            if any(sequence.request.cancelled is not None and sequence.request.cancelled() for sequence in active):
                raise Cancelled("the generations were cancelled")
            steps += 1
            if steps % CLEAR_INTERVAL == 0:
                clear_cache()

    def begin(self, most: int) -> list[_Sequence]:
        """Starts at most ``most`` further sequences and returns them."""
        new = [self._begun(self._waiting.popleft()) for _ in range(min(most, len(self._waiting)))]
        self.sequences += new
        return new

    def keep(self, sequence: _Sequence) -> None:
        """Returns the cache of a sequence to the pool, once."""
        cache, sequence.cache = sequence.cache, None
        if cache is not None:
            self._prefixes.put(cache)

    def _prefill(self, new: Sequence[_Sequence]) -> None:
        groups = _alike([sequence.tokens for sequence in new])
        for members, length in groups:
            first = new[members[0]]
            first.cache = self._prefixes.take(first.tokens[: length + 1])
            first.recorder.reused(len(first.cache.tokens))
        stems = [(new[members[0]], length) for members, length in groups if len(members) > 1]
        self._run([(first, length) for first, length in stems if len(first.cache.tokens) < length])
        for members, length in groups:
            first = new[members[0]]
            for i in members[1:]:
                new[i].cache = first.cache.fork(length)
                new[i].recorder.reused(length)
            for i in members:
                self._prefixes.mark(new[i].cache, new[i].tokens)
        self._run([(sequence, len(sequence.tokens)) for sequence in new])
        for sequence in new:
            sequence.recorder.prefilled()
            sequence.writer.watch_budget()

    def _run(self, wanted: Sequence[tuple[_Sequence, int]]) -> None:
        """Runs a prefix of each prompt, up to the given length."""
        sequences = [sequence for sequence, _ in wanted]
        found = self._engine.prefill_together(
            [sequence.tokens[:length] for sequence, length in wanted], [sequence.cache for sequence in sequences],
            [sequence.recorder.task for sequence in sequences], self._report,
        )  # fmt: skip
        for sequence, logits in zip(sequences, found, strict=True):
            sequence.logits = logits

    def _step(self, active: Sequence[_Sequence]) -> list[_Sequence]:
        """Samples the next tokens of each sequence and runs them. Returns the sequences that continue."""
        going, drawn = [], []
        for sequence in active:
            tokens = self._engine.draw(sequence.logits, sequence.request.sampler, sequence.recorder.task)
            for token in tokens:
                sequence.chunks.append(sequence.writer.chunk(token))
                if sequence.ended:
                    break
            else:
                going.append(sequence)
                drawn.append(tokens)
                continue
            self.keep(sequence)
        if self._report is not None and len(going) < len(active):
            done = sum(sequence.ended for sequence in self.sequences)
            self._report(Progress("generate", done, self._total, "replies"))
        if going:
            tasks = [sequence.recorder.task for sequence in going]
            logits = self._engine.run_together(drawn, [sequence.cache for sequence in going], tasks)
            for sequence, row in zip(going, logits, strict=True):
                sequence.logits = row
        return going


def _alike(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Returns groups of prompts, as indices, with the length of their common prefix: at least half of the shortest.

    For a group of one prompt, that length is one less than the length of the prompt.
    """
    groups: list[tuple[list[int], int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        own = len(prompts[i]) - 1
        if groups:
            members, length = groups[-1]
            common = min(own, shared(prompts[members[0]][:length], prompts[i]))
            if common >= max(_SHARED, min(length, own) // 2):
                groups[-1] = [*members, i], common
                continue
        groups.append(([i], own))
    return groups
