"""Runs the generations of requests in threads, and cancels them if the client disconnects."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from ..errors import PromptError
from ..generation.result import Chunk
from ..generation.sampling import TokenLogprobs
from ..generation.stats import Stats
from ..model import Model
from ..text.tool_calls import ToolCall
from .admission import Admission
from .failures import Refusal
from .metrics import Metrics

KEEP_ALIVE = 10.0  # seconds between signs of life; a long prompt must not look like a dead connection


class Reply:
    """A reply that is being generated. Iteration yields its chunks, and None if no chunk arrives for some seconds.

    Args:
        chunks: the chunks of the generation.
        one_call: whether the generation ends after its first tool call.
    """

    def __init__(self, chunks: AsyncIterator[Chunk | None], one_call: bool) -> None:
        self._chunks, self._one_call = chunks, one_call
        self.text = self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reasoning_tokens = 0
        self.reason: str | None = None
        self.stop_string: str | None = None
        self._stats: Stats | None = None

    async def __aiter__(self) -> AsyncIterator[Chunk | None]:
        async for chunk in self._chunks:
            if ends := self._one_call and chunk is not None and bool(chunk.tool_calls):
                chunk = dataclasses.replace(chunk, tool_calls=chunk.tool_calls[:1], finish_reason="tool_calls")
            if chunk is not None:
                self._add(chunk)
            yield chunk
            if ends:
                return

    def _add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.reasoning_tokens += chunk.where == "reasoning"
        self.calls += chunk.tool_calls
        if chunk.logprobs is not None:
            self.logprobs.append(chunk.logprobs)
        self.reason = chunk.finish_reason or self.reason
        self.stop_string = chunk.stop_string
        self._stats = chunk.stats

    async def complete(self) -> None:
        """Waits for the last chunk."""
        async for _ in self:
            pass

    @property
    def usage(self) -> Stats:
        """The statistics of the last chunk."""
        assert self._stats is not None
        return self._stats


class Service:
    """The state that all endpoints share: the model, its names, the admission and the metrics.

    Args:
        names: names of the model in requests; responses use the first.
        prompt_limit: maximum number of tokens of a prompt.

    Attributes:
        shutting_down: set when the server accepts no more connections.
    """

    def __init__(self, model: Model, names: list[str], admission: Admission, prompt_limit: int | None = None) -> None:
        self.model, self.names, self.admission = model, names, admission
        self.metrics = Metrics(model, admission)
        self._prompt_limit = prompt_limit
        self.generated = 0  # number of tokens so far
        self.shutting_down = threading.Event()
        self._ended = False
        self._cancels: set[threading.Event] = set()  # events of the running generations

    def check_name(self, name: str) -> None:
        """Rejects a model name that is not served here with status 404."""
        if name not in self.names:
            raise Refusal(
                404, f"the model {name[:200]!r} is not served here; it is {self.names[0]!r}", "model", "model_not_found"
            )

    def end(self) -> None:
        """Ends running generations, and rejects waiting and new requests with status 503. Any thread may call it."""
        self._ended = True
        for cancel in list(self._cancels):
            cancel.set()

    def _check_going(self) -> None:
        if self._ended:
            raise Refusal(503, "the server is shutting down; ask again later", code="service_unavailable")

    @asynccontextmanager
    async def generation(self, prompt: Any, options: dict[str, Any], *, one_call: bool = False) -> AsyncIterator[Reply]:
        """Waits for a place, starts a generation, and ends it at the end of the block.

        Args:
            one_call: whether to end the generation after its first tool call.

        Raises:
            Refusal: the queue is full, or the server is shutting down.
            FlashMoEError: an argument is invalid; this is raised before the first chunk.
        """
        cancel = threading.Event()
        async with self.admission.place():
            self._check_going()
            if self._prompt_limit is not None:
                await asyncio.to_thread(self._check_length, prompt, options, self._prompt_limit)
            begin = partial(self.model.stream, prompt, cancel=cancel, progress=False, **options)
            try:
                stream = await asyncio.to_thread(begin)
            except PromptError:
                context: int = self.model.config.max_position_embeddings
                await asyncio.to_thread(self._check_length, prompt, options, context - 1)
                raise
            queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()

            def put(item: Chunk | Exception | None) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, item)

            thread = threading.Thread(target=self._run, args=(stream, put), name="flash_moe request", daemon=True)
            self._cancels.add(cancel)
            thread.start()
            try:
                self._check_going()  # the state may have changed meanwhile
                yield Reply(self._going(_chunks(queue, ended)), one_call)
            finally:
                cancel.set()
                self._cancels.discard(cancel)
                with anyio.CancelScope(shield=True):  # the place becomes free only after its thread has ended
                    while not ended.is_set():
                        await anext(_chunks(queue, ended), None)

    async def _going(self, chunks: AsyncIterator[Chunk | None]) -> AsyncIterator[Chunk | None]:
        """Yields chunks until the server shuts down."""
        async for chunk in chunks:
            if chunk is not None and chunk.finish_reason == "cancelled":
                self._check_going()
            yield chunk

    def _check_length(self, prompt: Any, options: dict[str, Any], limit: int) -> None:
        count = len(self.count(prompt, options))
        if count > limit:
            raise Refusal(
                400, f"the prompt has {count} tokens, this server takes {limit}", "messages",
                "context_length_exceeded",
            )  # fmt: skip

    def count(self, prompt: Any, options: dict[str, Any]) -> list[int]:
        """Returns the token ids that a generation would run for a prompt."""
        return self.model.encode(prompt, **{name: options[name] for name in _TEMPLATE_OPTIONS if name in options})

    def _run(self, stream: Iterator[Chunk], put: Callable[[Chunk | Exception | None], object]) -> None:
        last: Chunk | None = None
        try:
            for chunk in stream:
                last = chunk
                self.generated += 1
                if chunk.tool_call_error is not None and chunk.finish_reason != "length":
                    chunk = dataclasses.replace(chunk, text=f"{chunk.text}({chunk.tool_call_error})")
                if chunk.logprobs is not None and chunk.logprobs.token in self.model.tokenizer.eos_token_ids:
                    chunk = dataclasses.replace(chunk, logprobs=None)  # a stop token is not part of the reply
                put(chunk)
        except Exception as error:
            put(error)
        finally:
            if last is not None:
                self.metrics.count(last.stats)
            put(None)


_TEMPLATE_OPTIONS = ("tools", "enable_thinking", "raw", "template_variables", "prefill")


async def _chunks(queue: asyncio.Queue[Chunk | Exception | None], ended: asyncio.Event) -> AsyncIterator[Chunk | None]:
    while not ended.is_set():
        try:
            item = await asyncio.wait_for(queue.get(), KEEP_ALIVE)
        except asyncio.TimeoutError:  # a builtin only since Python 3.11
            yield None
            continue
        if item is None:
            ended.set()
        elif isinstance(item, Exception):
            raise item
        else:
            yield item
