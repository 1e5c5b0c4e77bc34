"""Sends web pages the expert reads and their sources, ten times a second."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager

from ..model import Model
from . import sse

INTERVAL = 0.1  # seconds between events
QUIET = 10.0  # seconds after which an event is sent even if nothing was read


class ExpertsFeed:
    """Collects the uses of experts while at least one page watches. Without a watching page, it does almost no work.

    Args:
        name: name of the model in requests.
        tokens: function that returns the number of tokens generated so far.
        ended: function that returns whether the feed must end.
    """

    def __init__(self, model: Model, name: str, tokens: Callable[[], int], ended: Callable[[], bool]) -> None:
        self._model, self._name, self._tokens, self._ended = model, name, tokens, ended
        self._watching: set[_Watcher] = set()
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listens to the model while the block runs."""
        with self._model.expert_store.watch(self._used):
            yield

    def _used(self, layer: int, experts: Sequence[int], missing: Sequence[int]) -> None:
        if self._watching:
            size = self._model.expert_store.layouts[layer].stride
            with self._lock:
                for watcher in self._watching:
                    watcher.add(layer, experts, missing, size)

    def response(self) -> sse.EventStream:
        """Returns a stream of events.

        The first describes the model; each later one lists the reads since the previous event.
        """
        events = self._events()
        return sse.EventStream(events, events)

    async def _events(self) -> AsyncGenerator[str, None]:
        model, watcher = self._model, _Watcher()
        with self._lock:
            self._watching.add(watcher)
        try:
            yield sse.event(
                {
                    "model": self._name,
                    "layers": model.config.num_hidden_layers,
                    "experts": model.config.num_experts,
                    "experts_per_token": model.experts_per_token,
                }
            )
            last, tokens = time.monotonic(), self._tokens()
            while not self._ended():
                await asyncio.sleep(INTERVAL)
                with self._lock:
                    event = watcher.take()
                if event is not None:
                    now = self._tokens()
                    yield sse.event(event | {"tokens": now - tokens})
                    last, tokens = time.monotonic(), now
                elif time.monotonic() - last > QUIET:
                    last = time.monotonic()
                    yield sse.KEEP_ALIVE
        finally:
            with self._lock:
                self._watching.discard(watcher)


class _Watcher:
    """The reads that one page has not received yet."""

    def __init__(self) -> None:
        self._uses: dict[tuple[int, int], bool] = {}
        self._requested = self._missing = 0

    def add(self, layer: int, experts: Sequence[int], missing: Sequence[int], record_bytes: int) -> None:
        for expert, nbytes in zip(experts, missing, strict=True):
            self._uses[layer, expert] = self._uses.get((layer, expert), False) or nbytes > 0
        self._requested += record_bytes * len(experts)
        self._missing += sum(missing)

    def take(self) -> dict[str, object] | None:
        """Returns the reads since the last call as an event; None if there were none."""
        if not self._uses:
            return None
        event: dict[str, object] = {
            "uses": [[layer, expert, int(missing)] for (layer, expert), missing in self._uses.items()],
            "bytes_requested": self._requested,
            "bytes_missing": self._missing,
        }
        self._uses, self._requested, self._missing = {}, 0, 0
        return event
