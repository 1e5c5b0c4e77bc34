"""Runs one generation, from the tokens of a prompt to the chunks of a reply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import Cancelled
from ..progress import ProgressOption, following
from ..text.reply import ReplyParser
from .engine import Engine
from .prefixes import Prefixes
from .result import Chunk, FinishReason, Generation
from .sampling import Sampler
from .stats import Recorder
from .stopping import StopStrings


class Detokenizer(Protocol):
    """The interface of a detokenizer, which turns tokens into text one by one."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class TokenText(Protocol):
    """The methods of a tokenizer that a generation uses."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    def detokenizer(self) -> Detokenizer: ...


@dataclass(frozen=True)
class Request:
    """A prepared generation. It can run only once.

    Attributes:
        tokens: the token ids of the prompt.
        count: the maximum number of tokens to generate.
        parser: splits the reply into its parts. It has already read the part of the reply that the prompt contains.
        budget: the maximum number of reasoning tokens; None sets no limit.
        closing: the tokens that end the reasoning.
        cancelled: function that tells whether the generation was cancelled. It is called for every token, in every
            layer and during waits for reads.
        progress: receives the progress of the prompt; see :func:`~flash_moe.progress.following`.
    """

    tokens: Sequence[int]
    count: int
    sampler: Sampler
    stops: StopStrings
    parser: ReplyParser
    budget: int | None = None
    closing: Sequence[int] = ()
    cancelled: Callable[[], bool] | None = None
    progress: ProgressOption = False


@dataclass(frozen=True)
class Run:
    """A prepared generation and its future chunks.

    Attributes:
        chunks: iterator over the chunks. Each step generates the next one.
        enforced, parse, logprobs, prefill: the arguments of :meth:`Generation.of`.
        request: the request, for generations that run together.
    """

    chunks: Iterator[Chunk]
    enforced: str
    parse: Callable[[str], Any] | None
    logprobs: bool
    prefill: str
    request: Request

    def reply(self, chunks: Sequence[Chunk]) -> Generation:
        """Returns the reply that the chunks form."""
        return Generation.of(
            chunks, enforced=self.enforced, parse=self.parse, logprobs=self.logprobs, prefill=self.prefill
        )


def generate(
    engine: Engine, prefixes: Prefixes, tokenizer: TokenText, request: Request, record: Callable[[], Recorder]
) -> Iterator[Chunk]:
    """Yields a chunk per token until the model, a stop string, the count or the caller ends the generation.

    The time of the statistics starts when the caller requests the first chunk. Then ``record`` is called.
    """
    recorder, cache = record(), prefixes.take(request.tokens)
    task, writer = recorder.task, Writer(tokenizer, request, recorder)
    task.cancelled = request.cancelled
    recorder.reused(len(cache.tokens))
    try:
        try:
            with following(request.progress) as report:
                logits = engine.prefill(request.tokens, cache, report, task)
            recorder.prefilled()
            writer.watch_budget()
            for token in engine.decode(logits, cache, request.sampler, request.count, task):
                chunk = writer.chunk(token)
                with recorder.away():
                    yield chunk
                if chunk.finish_reason is not None:
                    return
                if request.cancelled is not None and request.cancelled():
                    break
        except Cancelled:
            if request.cancelled is None or not request.cancelled():
                raise
        with recorder.away():
            yield writer.cancelled()
    finally:  # also if the caller stops, or a callback or a pass fails
        prefixes.put(cache)


class Writer:
    """Turns tokens into chunks."""

    def __init__(self, tokenizer: TokenText, request: Request, recorder: Recorder) -> None:
        self._request, self._recorder, self._ends = request, recorder, tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer()
        self._count = self._thought = 0
        self._called = self._failed = False

    def chunk(self, token: int) -> Chunk:
        """Returns the chunk that a token adds to the reply."""
        self._recorder.token()
        self._count += 1
        reason: FinishReason | None = None
        if token in self._ends:
            piece, reason = self._detokenizer.finish(), "stop"
        else:
            piece = self._detokenizer.add(token)
            if self._count == self._request.count:
                piece, reason = piece + self._detokenizer.finish(), "length"
        text, stopped = self._request.stops.feed(piece)
        if stopped:
            reason = "stop"
        chunk = self._parsed(text, token, reason)
        self.watch_budget()
        return chunk

    def cancelled(self) -> Chunk:
        """Returns the last chunk of a cancelled reply."""
        return self._parsed("", None, "cancelled")  # drops an incomplete character

    def watch_budget(self) -> None:
        """Ends the reasoning when it has used its budget of tokens."""
        request = self._request
        if request.budget is None or request.parser.where != "reasoning":
            return
        if self._thought == request.budget:
            request.sampler.push(request.closing)
        self._thought += 1

    def _parsed(self, raw: str, token: int | None, reason: FinishReason | None) -> Chunk:
        parser = self._request.parser
        if reason is not None:
            raw += self._request.stops.flush()
        parts = parser.feed(raw, last=reason is not None)
        self._called = self._called or bool(parts.tool_calls)
        self._failed = self._failed or parts.error is not None
        if reason == "stop" and self._called and not self._failed:
            reason = "tool_calls"
        return Chunk(
            text=parts.text,
            token=token,
            stats=self._recorder.stats,
            finish_reason=reason,
            logprobs=None if token is None else self._request.sampler.logprobs,
            reasoning=parts.reasoning,
            tool_calls=tuple(parts.tool_calls),
            tool_call_error=parts.error,
            raw_text=raw,
            where=parser.where,
            stop_string=self._request.stops.found,
        )
