"""Several generations at once: their sequences decode together, so that a layer's experts are read once for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import Cancelled
from ..progress import Progress, ProgressOption, following
from .engine import Engine
from .prefixes import Prefixes
from .result import Chunk
from .run import Request, TokenText, Writer
from .stats import Recorder


@dataclass
class _Sequence:
    """One generation among several."""

    request: Request
    recorder: Recorder
    writer: Writer
    cache: Any
    logits: Any = None
    chunks: list[Chunk] = field(default_factory=list)

    def draw(self) -> int:
        """Draws the next token and writes its chunk."""
        self.request.sampler.prepare()
        token = self.request.sampler(self.logits)
        self.chunks.append(self.writer.chunk(token))
        return token

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

    Prompts run one after the other. What is read while several decode counts in the statistics of each of them.
    """
    sequences: list[_Sequence] = []
    with following(progress) as report, ExitStack() as caches:
        try:
            for request in requests:
                recorder, cache = record(request), prefixes.take(request.tokens)
                caches.callback(prefixes.put, cache)
                sequence = _Sequence(request, recorder, Writer(tokenizer, request, recorder), cache)
                sequences.append(sequence)
                recorder.task.cancelled = request.cancelled
                recorder.reused(len(cache.tokens))
                sequence.logits = engine.prefill(request.tokens, cache, None, recorder.task)
                recorder.prefilled()
                sequence.writer.watch_budget()
            _decode(engine, sequences, lambda done: _tell(report, done, len(requests)))
        except Cancelled:
            if not any(request.cancelled is not None and request.cancelled() for request in requests):
                raise
            begun = len(sequences)
            for request in requests[begun:]:
                recorder = record(request)
                sequences.append(_Sequence(request, recorder, Writer(tokenizer, request, recorder), None))
            for sequence in sequences:
                if not sequence.ended:
                    sequence.chunks.append(sequence.writer.cancelled())
    return [sequence.chunks for sequence in sequences]


def _decode(engine: Engine, sequences: Sequence[_Sequence], tell: Callable[[int], None]) -> None:
    active, done = list(sequences), 0
    while active:
        drawn = [(sequence, sequence.draw()) for sequence in active]
        going = [(sequence, token) for sequence, token in drawn if not sequence.ended]
        if len(going) < len(active):
            tell(len(sequences) - len(going))
        active = [sequence for sequence, _ in going]
        done += 1
        if active:
            tasks = [sequence.recorder.task for sequence in active]
            logits = engine.decode_together([token for _, token in going], [s.cache for s in active], tasks)
            for sequence, row in zip(active, logits, strict=True):
                sequence.logits = row
            if done % 16 == 0:
                mx.clear_cache()


def _tell(report: Callable[[Progress], None] | None, done: int, total: int) -> None:
    if report is not None:
        report(Progress("generate", done, total, "replies"))
