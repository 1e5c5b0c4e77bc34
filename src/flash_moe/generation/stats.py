"""The statistics of a generation: tokens, times and bytes of experts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..amounts import format_bytes, format_seconds, percent
from ..nn.network import Network, Task
from ..notebook import html
from ..notebook.figures import Picture, times_of
from .streaming_stats import AheadStats, ChoiceStats, PrefetchStats, StreamingRecorder


@dataclass(frozen=True, repr=False)
class Stats:
    """The statistics of one generation so far. ``str()`` returns a summary in one line.

    Attributes:
        prompt_tokens, generated_tokens: numbers of tokens. A final end-of-sequence token counts as generated.
        reused_tokens: number of prompt tokens that came from the cache of an earlier generation.
        prompt_seconds: seconds from the request of the first chunk to the logits of the first token. decode_seconds:
            seconds after that. Time that the caller spends between the chunks of a stream does not count.
        time_to_first_token: seconds from the request of the first chunk to the first token; None before it.
        experts_per_token: the K in use. model_experts_per_token: the model's own K.
        expert_bytes_requested: bytes of all requested expert records, in prefill and decode.
        expert_bytes_missing: bytes that were not in memory (page cache or expert cache) when they were requested, or
            when a prefetch began to read them.
        decode_bytes_requested: bytes of expert records requested in decoding.
        fetch_seconds: seconds spent waiting for expert bytes. decode_fetch_seconds: the part of it in decoding.
        peak_memory_bytes: peak memory of MLX since the process started.
        prefetch: statistics of prefetching; None if it is off.
        choice: statistics of dropped and swapped experts; None if both options are off.
        ahead: statistics of tokens that ran ahead, without waiting for the host in every layer; None if no bank on a
            GPU keeps experts.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prompt_seconds: float
    decode_seconds: float
    time_to_first_token: float | None
    experts_per_token: int
    model_experts_per_token: int
    expert_bytes_requested: int
    expert_bytes_missing: int
    decode_bytes_requested: int
    fetch_seconds: float
    decode_fetch_seconds: float
    peak_memory_bytes: int
    prefetch: PrefetchStats | None = None
    choice: ChoiceStats | None = None
    ahead: AheadStats | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """The speed of prefill, without reused tokens."""
        tokens = self.prompt_tokens - self.reused_tokens
        return tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        """The speed of decoding. The first token counts as part of the prompt."""
        tokens = self.generated_tokens - 1
        return tokens / self.decode_seconds if tokens > 0 and self.decode_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """The share of requested expert bytes that were already in memory; 1 if none were requested."""
        if not self.expert_bytes_requested:
            return 1.0
        return 1 - self.expert_bytes_missing / self.expert_bytes_requested

    @property
    def expert_bytes_per_token(self) -> float:
        """The number of expert bytes requested per decoded token."""
        tokens = self.generated_tokens - 1
        return self.decode_bytes_requested / tokens if tokens > 0 else 0.0

    def __str__(self) -> str:
        return _summary(self)

    def __repr__(self) -> str:
        return f"Stats({self})"

    def _repr_html_(self) -> str:
        return html.table(_rows(self))

    def plot(self) -> Picture:
        """Plots the parts of the time per token, in prefill and decode, and the share of bytes in memory.

        Raises:
            ArgumentError: matplotlib, the extra ``plot``, is not installed.
        """
        return times_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns all statistics as plain values, for JSON."""
        derived = ("prompt_tokens_per_second", "generated_tokens_per_second", "hit_rate", "expert_bytes_per_token")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def _summary(stats: Stats) -> str:
    """Returns one line: speed, K, expert bytes per token, hit rate."""
    k, own = stats.experts_per_token, stats.model_experts_per_token
    parts = [
        f"{stats.prompt_tokens} prompt tokens"
        + (f" ({stats.reused_tokens} reused)" if stats.reused_tokens else "")
        + f" at {stats.prompt_tokens_per_second:.1f} tok/s",
        f"{stats.generated_tokens} generated"
        + (f" at {speed:.1f} tok/s" if (speed := stats.generated_tokens_per_second) else ""),
        f"K={k}" if k == own else f"K={k} of the model's {own}",
    ]
    if stats.expert_bytes_requested:
        if stats.expert_bytes_per_token:
            parts.append(f"{format_bytes(stats.expert_bytes_per_token)} of experts per token")
        parts.append(f"{percent(stats.hit_rate)} in memory")
    if stats.prefetch is not None:
        parts.append(str(stats.prefetch))
    if stats.choice is not None:
        parts.append(str(stats.choice))
    if stats.ahead is not None and stats.ahead.tokens:
        parts.append(str(stats.ahead))
    return " · ".join(parts)


def _rows(stats: Stats) -> list[tuple[str, str]]:
    """Returns the content of :func:`_summary` as the names and values of a table."""
    k, own = stats.experts_per_token, stats.model_experts_per_token
    reused = f", {stats.reused_tokens:,} reused" if stats.reused_tokens else ""
    found = [
        ("prompt", f"{stats.prompt_tokens:,} tokens{reused}, {format_seconds(stats.prompt_seconds)}"),
        ("reply", f"{stats.generated_tokens:,} tokens, {format_seconds(stats.decode_seconds)}"),
        (
            "speed",
            f"{stats.prompt_tokens_per_second:.1f} tok/s prompt, {stats.generated_tokens_per_second:.1f} decoding",
        ),
        ("experts per token", f"{k}" if k == own else f"{k} of the model's {own}"),
    ]
    if stats.expert_bytes_requested:
        found.append(("expert bytes", f"{format_bytes(stats.expert_bytes_per_token)} per decoded token"))
        found.append(("in memory", percent(stats.hit_rate)))
        found.append(("waiting for experts", format_seconds(stats.fetch_seconds)))
    found += [
        (name, str(part)) for name, part in (("prefetch", stats.prefetch), ("choice", stats.choice)) if part is not None
    ]
    return [*found, ("peak memory", format_bytes(stats.peak_memory_bytes))]


class Recorder:
    """Measures one generation and computes its :class:`Stats`.

    Attributes:
        task: collects the counters of the passes of this generation.
    """

    def __init__(self, decoder: Network, prompt_tokens: int, k: int, model_k: int) -> None:
        self.task = Task()
        self._streaming = StreamingRecorder(decoder, self.task)
        self._prompt_tokens, self._reused, self._k, self._model_k = prompt_tokens, 0, k, model_k
        self._away = 0.0
        self._start = self._now()
        self._prefilled: float | None = None
        self._prefill_bytes, self._prefill_waited = 0, 0.0
        self._first: float | None = None
        self._tokens = 0
        self._last = self._start

    def reused(self, tokens: int) -> None:
        """Records that ``tokens`` tokens of the prompt came from a cache."""
        self._reused = tokens

    def prefilled(self) -> None:
        """Records that the first logits are computed."""
        self._prefilled = self._now()
        self._prefill_bytes = self.task.store.bytes_requested
        self._prefill_waited = self.task.store.fetch_seconds

    @contextmanager
    def away(self) -> Iterator[None]:
        """Stops the clock while the caller processes a chunk."""
        left = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - left

    def _now(self) -> float:
        return time.perf_counter() - self._away

    def token(self) -> None:
        """Records that a token was sampled."""
        self._last = self._now()
        self._first = self._first or self._last
        self._tokens += 1

    @property
    def stats(self) -> Stats:
        """Returns the statistics up to the last token."""
        prefilled = self._prefilled or self._now()
        counted = self.task.store
        return Stats(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
            generated_tokens=self._tokens,
            prompt_seconds=prefilled - self._start,
            decode_seconds=max(self._last - prefilled, 0.0),
            time_to_first_token=None if self._first is None else self._first - self._start,
            experts_per_token=self._k,
            model_experts_per_token=self._model_k,
            expert_bytes_requested=counted.bytes_requested,
            expert_bytes_missing=counted.bytes_missing,
            decode_bytes_requested=counted.bytes_requested - self._prefill_bytes if self._prefilled else 0,
            fetch_seconds=counted.fetch_seconds,
            decode_fetch_seconds=counted.fetch_seconds - self._prefill_waited if self._prefilled else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            prefetch=self._streaming.prefetch,
            choice=self._streaming.choice,
            ahead=self._streaming.ahead,
        )
