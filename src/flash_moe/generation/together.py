"""Several generations at once: prompts and replies run through the layers together, so that experts are read once for all.

Where prompts begin alike, that beginning runs once. As many sequences run as memory allows; where half of them have ended,
the next ones begin.
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

_SHARED = 16  # tokens; running a shorter beginning by itself does not pay


@dataclass
class _Sequence:
    """One generation among several."""

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
        """Whether the reply is complete."""
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None


def generate_together(
    engine: Engine,
    prefixes: Prefixes,
    tokenizer: TokenText,
    requests: Sequence[Request],
    record: Callable[[Request], Recorder],
    progress: ProgressOption,
) -> list[list[Chunk]]:
    """Returns the chunks of every request, in order; all end early, as cancelled, where one is cancelled.

    What is read while several run counts in the statistics of each of them.
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
    """The sequences of a call.

    Args:
        begun: makes a sequence, whose time runs from then on.

    Attributes:
        sequences: those that have begun, in order.
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
        """Runs all requests to their end."""
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
        """Returns the next sequences."""
        new = [self._begun(self._waiting.popleft()) for _ in range(min(most, len(self._waiting)))]
        self.sequences += new
        return new

    def keep(self, sequence: _Sequence) -> None:
        """Gives a sequence's cache back, once."""
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
        """Runs the beginnings of prompts, up to a length each."""
        sequences = [sequence for sequence, _ in wanted]
        found = self._engine.prefill_together(
            [sequence.tokens[:length] for sequence, length in wanted], [sequence.cache for sequence in sequences],
            [sequence.recorder.task for sequence in sequences], self._report,
        )  # fmt: skip
        for sequence, logits in zip(sequences, found, strict=True):
            sequence.logits = logits

    def _step(self, active: Sequence[_Sequence]) -> list[_Sequence]:
        """Draws the next tokens of each sequence and runs them; returns those that go on."""
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
    """Returns groups of prompts that share at least half of the shortest, as indices, and what they share: its length.

    That of a single prompt is one less than its own.
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
