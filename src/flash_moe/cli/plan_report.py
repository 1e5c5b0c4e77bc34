"""What `flash-moe plan` found, in at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..amounts import format_bytes, percent
from ..planning.estimate import Seconds
from ..planning.plan import STATES, Plan

_LABEL, _CELL = 34, 13  # columns


def table(plan: Plan) -> str:
    """Memory, bytes, and times term by term."""
    need, memory = plan.needs, plan.memory
    k, own = need.experts_per_token, need.config.num_experts_per_tok
    form = "packed" if plan.packed else "not packed"
    limit = " (the model's own limit)" if memory.largest_context == need.config.max_position_embeddings else ""
    kept = min(1.0, max(0, memory.left) / need.experts) if need.experts else 1.0
    lines = [
        f"{plan.model} on {plan.machine}",
        f"K={k}" + ("" if k == own else f" of the model's {own}") + f", {form}, experts {plan.expert_io}",
        "",
        _line("memory", format_bytes(memory.total)),
        _line("  system and other programs", format_bytes(memory.kept)),
        _line("  resident weights", format_bytes(memory.resident)),
        _line(f"  {plan.context:,} tokens of context", format_bytes(memory.cache)),
        *([_line("  bank for experts", format_bytes(memory.slots))] if memory.slots else []),
        _line(
            "  left to keep experts in",
            f"{format_bytes(memory.left)}: {percent(kept)} of {format_bytes(need.experts)}"
            if memory.fits
            else "nothing",
        ),
        _line("fits", "yes" if memory.fits else f"no: {format_bytes(-memory.left)} too little"),
        _line("largest context", f"{memory.largest_context:,} tokens{limit}"),
        _line("experts per token", format_bytes(need.bytes_per_token)),
        "",
        _row("", [f"{state}" for state in STATES]),
        _row("experts in memory, decoding", [percent(plan.shares[state].decode) for state in STATES]),
        _row("tokens per second", _cells(plan.decode, lambda s: f"{1 / s.total:.2f}")),
        _row("ms per token", _cells(plan.decode, lambda s: _ms(s.total))),
        *_term_rows(plan, plan.decode, _ms),
        "",
        _row("experts in memory, prompt", [percent(plan.shares[state].prompt) for state in STATES]),
        _row(f"s to the first of {plan.prompt:,} tokens", _cells(plan.prefill, lambda s: f"{s.total:.2f}")),
        *_term_rows(plan, plan.prefill, lambda seconds: f"{seconds:.2f}"),
        "",
        *_notes(plan),
    ]
    return "\n".join(lines)


def _term_rows(plan: Plan, seconds: dict[str, Seconds | None], shown: Callable[[float], str]) -> list[str]:
    """A row for each term that is not nothing throughout."""
    costs, names = plan.costs, {}
    speeds = costs.reads
    group = seconds is plan.prefill
    if speeds is not None:
        names["ssd"] = f"SSD, {_speed(speeds.ssd_group if group else speeds.ssd)}"
        names["page_cache"] = f"page cache, {_speed(speeds.memory_group if group else speeds.memory)}"
    names |= {
        "memory": f"weights, {_speed(costs.bandwidth)}",
        "compute": f"arithmetic, {costs.flops / 1e9:,.0f} GFLOPS",
        "overhead": "overhead",
    }
    present = [s for s in seconds.values() if s is not None]
    return [
        _row(f"  {label}", _cells(seconds, lambda s, name=name: shown(getattr(s, name))))  # type: ignore[misc]
        for name, label in names.items()
        if any(getattr(s, name) for s in present)
    ]


def _notes(plan: Plan) -> list[str]:
    notes = [f"Expected shares assume experts used in proportion to rank^-{plan.skew:g}, and memory that"]
    notes.append("forgets the least recently used. Weights are loaded; times are for one sequence.")
    if not plan.measured:
        notes.append("Reckoned from the chip's figures and assumptions; nobody has measured them.")
    elif plan.costs.reads is None and plan.expert_io != "resident":
        notes.append("The checkpoint is not here, so the disk could not be measured.")
    return notes


def _cells(seconds: dict[str, Seconds | None], shown: Callable[[Seconds], str]) -> list[str]:
    found = [seconds[state] for state in STATES]
    return ["-" if s is None else shown(s) for s in found]


def _line(label: str, value: str) -> str:
    return f"{label:{_LABEL}}{value}"


def _row(label: str, cells: list[str]) -> str:
    return f"{label:{_LABEL}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _speed(bytes_per_second: float) -> str:
    return "in place" if math.isinf(bytes_per_second) else f"{format_bytes(bytes_per_second)}/s"
