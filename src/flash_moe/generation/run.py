"""One generation, from the tokens of a prompt to chunks of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from .engine import Engine
from .prefixes import Prefixes
from .result import Chunk, FinishReason
from .sampling import Sampler
from .stats import Recorder
from .stopping import StopStrings


class Detokenizer(Protocol):
    """Makes text of tokens one by one."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class TokenText(Protocol):
    """What a generation needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    def detokenizer(self) -> Detokenizer: ...


def generate(
    engine: Engine,
    prefixes: Prefixes,
    tokenizer: TokenText,
    tokens: Sequence[int],
    count: int,
    sampler: Sampler,
    stops: StopStrings,
    record: Callable[[], Recorder],
    progress: Callable[[int], None] | None,
) -> Iterator[Chunk]:
    """Yields a chunk per token until the model, a stop string or ``count`` ends it. Time runs from the first one on."""
    recorder, cache = record(), prefixes.take(tokens)
    task = recorder.task
    recorder.reused(len(cache.tokens))
    try:
        logits = engine.prefill(tokens, cache, progress, task)
        recorder.prefilled()
        drawn = engine.decode(logits, cache, sampler, count, task)
        yield from _chunks(drawn, sampler, tokenizer, count, stops, recorder)
    finally:  # also where the caller has had enough, its callback failed or a pass did
        prefixes.put(cache)


def _chunks(
    drawn: Iterator[int], sampler: Sampler, tokenizer: TokenText, count: int, stops: StopStrings, recorder: Recorder
) -> Iterator[Chunk]:
    detokenizer = tokenizer.detokenizer()
    for number, token in enumerate(drawn, start=1):
        recorder.token()
        reason: FinishReason | None = None
        if token in tokenizer.eos_token_ids:
            piece, reason = detokenizer.finish(), "stop"
        else:
            piece = detokenizer.add(token)
            if number == count:
                piece, reason = piece + detokenizer.finish(), "length"
        text, stopped = stops.feed(piece)
        if stopped:
            reason = "stop"
        elif reason is not None:
            text += stops.flush()
        chunk = Chunk(text, token, recorder.stats, reason, sampler.logprobs)
        with recorder.away():
            yield chunk
        if reason is not None:
            return
