"""What a generation gives back."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

from .stats import Stats
from .streaming_stats import PrefetchStats

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Chunk:
    """One step of a stream.

    Attributes:
        text: text that became certain with this token; may be empty.
        token: the token id.
        stats: statistics up to this token.
        finish_reason: in the last chunk, ``"stop"`` (end of sequence or a stop string) or ``"length"``; else None.
    """

    text: str
    token: int
    stats: Stats
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation; ``str()`` of it is the text.

    Attributes:
        text: the generated text, without stop strings and special tokens.
        tokens: all generated token ids, a final end-of-sequence token included.
        finish_reason: ``"stop"`` or ``"length"``.
        stats: what it cost.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return (
            f'<div style="white-space:pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="opacity:.6;font-size:85%;margin-top:.5em">{html.escape(summary(self.stats))}</div>'
        )


def summary(stats: Stats) -> str:
    """One line for people: speed, K, expert bytes per token, hit rate."""
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
        parts.append(f"{stats.hit_rate:.0%} in memory")
    if stats.prefetch is not None:
        parts.append(_prefetch(stats.prefetch))
    if stats.choice is not None:
        parts.append(str(stats.choice))
    return " · ".join(parts)


def _prefetch(stats: PrefetchStats) -> str:
    details = []
    if stats.recall is not None:
        details.append(f"{stats.recall:.0%} of experts predicted")
    if stats.time_saved is not None:
        details.append(f"{abs(stats.time_saved):.0%} {'less' if stats.time_saved >= 0 else 'more'} time per token")
    return f"prefetch {stats.decision}" + (f" ({', '.join(details)})" if details else "")


def format_bytes(count: float) -> str:
    """A size for people: 7,077,888 is "7.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
