"""Statistics for people: one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..amounts import format_bytes, format_seconds, percent

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


def rows(stats: Stats) -> list[tuple[str, str]]:
    """Returns the same as names and values of a small table."""
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
