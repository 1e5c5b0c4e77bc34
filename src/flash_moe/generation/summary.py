"""Statistics for people: one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..amounts import format_bytes, percent

if TYPE_CHECKING:
    from .stats import Stats


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
        parts.append(f"{percent(stats.hit_rate)} in memory")
    if stats.prefetch is not None:
        parts.append(str(stats.prefetch))
    if stats.choice is not None:
        parts.append(str(stats.choice))
    if stats.ahead is not None and stats.ahead.tokens:
        parts.append(str(stats.ahead))
    return " · ".join(parts)
