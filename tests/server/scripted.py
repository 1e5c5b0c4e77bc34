"""A model that says what a test tells it to, one chunk per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from flash_moe.errors import ArgumentError

STATS = SimpleNamespace(
    prompt_tokens=7, generated_tokens=3, reused_tokens=2, expert_bytes_requested=100, expert_bytes_missing=25,
    prompt_seconds=0.5, decode_seconds=0.25, fetch_seconds=0.125,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of a stream, with what the server uses of a chunk."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Any, ...] = ()
    finish_reason: str | None = None
    stats: Any = field(default_factory=lambda: STATS)
    logprobs: Any = None
    tool_call_error: Exception | None = None
    stop_string: str | None = None

    @property
    def where(self) -> str:
        return "reasoning" if self.reasoning else "text"


def chunk(text: str = "", reasoning: str = "", calls: tuple[Any, ...] = (), reason: str | None = None) -> Step:
    """A step of a stream."""
    return Step(text, reasoning, calls, reason)


class ScriptedModel:
    """Stands for a model.

    Attributes:
        asked: prompt and options of every generation.
        cancelled: generations that were cancelled.
    """

    path = Path("scripted")
    config = SimpleNamespace(num_hidden_layers=2, num_experts=4, max_position_embeddings=200)
    experts_per_token = 2

    def __init__(self, steps: list[Any], seconds: float = 0.0) -> None:
        self._steps, self._seconds = steps, seconds
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.cancelled = 0

    def stream(self, prompt: Any, *, cancel: Any, progress: bool, **options: Any) -> Iterator[Any]:
        assert not progress
        if options.get("temperature") == 1.5:
            raise ArgumentError("temperature is 1.5, expected something else")
        self.asked.append((prompt, options))
        return self._chunks(cancel)

    def _chunks(self, cancel: Any) -> Iterator[Any]:
        for step in self._steps:
            end = time.monotonic() + self._seconds
            while time.monotonic() < end and not cancel.is_set():
                time.sleep(0.001)
            if cancel.is_set():
                self.cancelled += 1
                yield chunk(reason="cancelled")
                return
            if isinstance(step, Exception):
                raise step
            yield step

    def encode(self, prompt: Any, *, prefill: str = "", **options: Any) -> list[int]:
        return list(range(sum(len(str(message)) for message in prompt) + len(prefill)))

    @property
    def expert_store(self) -> ScriptedModel:
        return self

    layouts: ClassVar = {layer: SimpleNamespace(stride=1000) for layer in range(8)}

    @contextmanager
    def watch(self, used: Callable[..., None]) -> Iterator[None]:
        self.used = used
        yield
