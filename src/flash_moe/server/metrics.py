"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

from ..generation.stats import Stats
from ..model import Model
from .admission import Admission

_HELP = {
    "requests_total": ("counter", "Requests by path and status."),
    "prompt_tokens_total": ("counter", "Prompt tokens, those reused from a cache included."),
    "reused_tokens_total": ("counter", "Prompt tokens whose state was still in a cache."),
    "generated_tokens_total": ("counter", "Generated tokens."),
    "expert_bytes_requested_total": ("counter", "Bytes of expert records that generations asked for."),
    "expert_bytes_missing_total": ("counter", "Those of them that had to be read from disk."),
    "phase_seconds_total": ("counter", "Seconds by phase: prompt, decode, and the wait for experts within both."),
    "requests_active": ("gauge", "Generations that run."),
    "requests_waiting": ("gauge", "Requests in the queue."),
    "expert_hit_rate": ("gauge", "Share of requested expert bytes that were in memory, since the start."),
}


class Metrics:
    """Adds up the statistics of generations. Several threads can use it."""

    def __init__(self, model: Model, admission: Admission) -> None:
        self._model, self._admission = model, admission
        self._lock = threading.Lock()
        self._counters: Counter[tuple[str, str]] = Counter()

    def request(self, path: str, status: int) -> None:
        """Counts a response. ``path`` is a route of the server, never a path that a client made up."""
        with self._lock:
            self._counters["requests_total", f'path="{path}",status="{status}"'] += 1

    def count(self, stats: Stats) -> None:
        """Adds the statistics of a completed generation."""
        values = {
            ("prompt_tokens_total", ""): stats.prompt_tokens,
            ("reused_tokens_total", ""): stats.reused_tokens,
            ("generated_tokens_total", ""): stats.generated_tokens,
            ("expert_bytes_requested_total", ""): stats.expert_bytes_requested,
            ("expert_bytes_missing_total", ""): stats.expert_bytes_missing,
            ("phase_seconds_total", 'phase="prompt"'): stats.prompt_seconds,
            ("phase_seconds_total", 'phase="decode"'): stats.decode_seconds,
            ("phase_seconds_total", 'phase="fetch"'): stats.fetch_seconds,
        }
        with self._lock:
            self._counters.update(values)

    def text(self) -> str:
        """Returns all metrics in Prometheus' text format, version 0.0.4."""
        with self._lock:
            values: dict[tuple[str, str], float] = dict(self._counters)
        requested = values.get(("expert_bytes_requested_total", ""), 0)
        values["requests_active", ""] = self._admission.active
        values["requests_waiting", ""] = self._admission.waiting
        missing = values.get(("expert_bytes_missing_total", ""), 0)
        values["expert_hit_rate", ""] = 1 - missing / requested if requested else 1
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP flash_moe_{name} {text}", f"# TYPE flash_moe_{name} {kind}"]
            for (metric, labels), value in sorted(values.items()):
                if metric == name:
                    lines.append(f"flash_moe_{name}{'{' + labels + '}' if labels else ''} {value:.10g}")
        return "\n".join(lines) + "\n"
