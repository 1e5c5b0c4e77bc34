"""The statistics of a generation: tokens, times, and bytes of experts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..nn.network import Network, Task
from ..notebook import html
from ..notebook.figures import Picture, times_of
from .streaming_stats import AheadStats, ChoiceStats, PrefetchStats, StreamingRecorder
from .summary import rows, summary


@dataclass(frozen=True, repr=False)
class Stats:
    """Statistics of one generation so far; ``str()`` of it is one line for people.

    Attributes:
        prompt_tokens, generated_tokens: counts; a final end-of-sequence token counts as generated.
        reused_tokens: of the prompt, those whose state was there from the generation before.
        prompt_seconds: from the moment the first token is asked for to its logits. decode_seconds: from then on; time
            that a program spends between the chunks of a stream does not count.
        time_to_first_token: seconds from the same moment to the first token; None before it.
        experts_per_token: the K used. model_experts_per_token: the model's own.
        expert_bytes_requested: bytes of all expert records asked for, in prefill and decode.
        expert_bytes_missing: those that were not in memory (page cache or expert cache) when asked for, or when a
            prefetch began to read them.
        decode_bytes_requested: bytes of expert records asked for while decoding.
        fetch_seconds: time spent waiting for expert bytes. decode_fetch_seconds: that of it which decoding spent.
        peak_memory_bytes: the most memory MLX has held since the process started.
        prefetch: what prefetching did; None where it is off.
        choice: experts that were dropped or swapped; None where that is off.
        ahead: tokens that did not wait for the host in every layer; None where no bank on a GPU keeps experts.
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
        """Speed of prefill; reused tokens do not count."""
        tokens = self.prompt_tokens - self.reused_tokens
        return tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        """Speed of decoding; the first token belongs to the prompt."""
        tokens = self.generated_tokens - 1
        return tokens / self.decode_seconds if tokens > 0 and self.decode_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the requested expert bytes that were in memory already; 1 when none were requested."""
        if not self.expert_bytes_requested:
            return 1.0
        return 1 - self.expert_bytes_missing / self.expert_bytes_requested

    @property
    def expert_bytes_per_token(self) -> float:
        """Expert bytes requested per decoded token."""
        tokens = self.generated_tokens - 1
        return self.decode_bytes_requested / tokens if tokens > 0 else 0.0

    def __str__(self) -> str:
        return summary(self)

    def __repr__(self) -> str:
        return f"Stats({self})"

    def _repr_html_(self) -> str:
        return html.table(rows(self))

    def plot(self) -> Picture:
        """Draws where the time of a token went, in the prompt and while decoding, and what share of bytes was in memory.

        Raises:
            ArgumentError: matplotlib, the extra ``plot``, is not installed.
        """
        return times_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as plain values, for JSON."""
        derived = ("prompt_tokens_per_second", "generated_tokens_per_second", "hit_rate", "expert_bytes_per_token")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class Recorder:
    """Follows one generation and makes :class:`Stats` of it.

    Attributes:
        task: what the passes of this generation count in.
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
        """Notes that ``tokens`` tokens of the prompt need not be run."""
        self._reused = tokens

    def prefilled(self) -> None:
        """Notes that the first logits are computed."""
        self._prefilled = self._now()
        self._prefill_bytes = self.task.store.bytes_requested
        self._prefill_waited = self.task.store.fetch_seconds

    @contextmanager
    def away(self) -> Iterator[None]:
        """Stops the clock while the caller has a chunk."""
        left = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - left

    def _now(self) -> float:
        return time.perf_counter() - self._away

    def token(self) -> None:
        """A token has been chosen."""
        self._last = self._now()
        self._first = self._first or self._last
        self._tokens += 1

    @property
    def stats(self) -> Stats:
        """The statistics up to the last token."""
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
