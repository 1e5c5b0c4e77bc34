"""Formats the results of `flash-moe plan` as a sentence and as a table of at most 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable

from ..amounts import format_bytes, format_memory, format_seconds, percent
from ..planning.chips import LAYER_SECONDS
from ..planning.estimate import Seconds
from ..planning.plan import STATES, Plan

_LABEL, _CELL = 34, 13  # columns


def table(plan: Plan) -> str:
    """Returns the conclusion, the memory, the bytes, and the times term by term."""
    need, memory, n = plan.needs, plan.memory, plan.group.machines
    k, own = need.experts_per_token, need.dimensions.num_experts_per_tok
    form = "packed" if plan.packed else "not packed"
    limit = " (the model's own limit)" if memory.largest_context == need.dimensions.max_position_embeddings else ""
    kept = min(1.0, max(0, memory.left) / need.experts) if need.experts else 1.0
    lines = [
        f"{plan.model} on {plan.machine}" if n == 1 else f"{plan.model} on {n} machines, each {plan.machine}",
        f"K={k}" + ("" if k == own else f" of the model's {own}") + f", {form}, experts {plan.expert_io}",
        "",
        *textwrap.wrap(conclusion(plan), 80),
        "",
        _line("memory", format_memory(memory.total)),
        _line("  system and other programs", format_memory(memory.kept)),
        _line("  resident weights", format_memory(memory.resident)),
        _line(f"  {plan.context:,} tokens of context", format_memory(memory.cache)),
        *([_line("  bank for experts", format_memory(memory.slots))] if memory.slots else []),
        _line(
            "  left to keep experts in",
            f"{format_memory(memory.left)}: {percent(kept)} of the experts" if memory.fits else "nothing",
        ),
        _line("fits", "yes" if memory.fits else f"no: {format_memory(-memory.left)} too little"),
        _line("largest context", f"{memory.largest_context:,} tokens{limit}"),
        *_download_lines(plan),
        _line("experts in all", format_bytes(need.experts)),
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


def conclusion(plan: Plan) -> str:
    """Returns sentences: whether the model fits, its speed, and whether its download fits on the disk."""
    decode, prefill = plan.decode["expected"], plan.prefill["expected"]
    if not plan.memory.fits:
        text = f"It does not fit: {format_memory(-plan.memory.left)} of memory are missing."
    elif decode is None or prefill is None:
        text = "It fits into memory. Its speed depends on the disk, which is measured once the model is on it."
    else:
        text = (
            f"It fits, and should generate about {_rounded(1 / decode.total)} tokens per second. The answer to a prompt of "
            f"{plan.prompt:,} tokens should begin after {format_seconds(prefill.total)}."
        )
    if plan.download is None:
        return text
    size, free = format_bytes(plan.download.nbytes), format_bytes(plan.download.free)
    if plan.download.fits:
        return f"{text} The download of {size} fits on this machine's disk, which has {free} free."
    return f"{text} The download of {size} does not fit on this machine's disk, which has {free} free."


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 9.5 else f"{rate:.1f}"


def _download_lines(plan: Plan) -> list[str]:
    if plan.download is None:
        return []
    return [_line("download", f"{format_bytes(plan.download.nbytes)}; {format_bytes(plan.download.free)} free here")]


def _term_rows(plan: Plan, seconds: dict[str, Seconds | None], shown: Callable[[float], str]) -> list[str]:
    """Returns a row for each term that is not always zero."""
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
        "network": f"sums over {plan.group.machines} machines",
    }
    present = [s for s in seconds.values() if s is not None]
    return [
        _row(f"  {label}", _cells(seconds, lambda s, name=name: shown(getattr(s, name))))  # type: ignore[misc]
        for name, label in names.items()
        if any(getattr(s, name) for s in present)
    ]


def _notes(plan: Plan) -> list[str]:
    notes = [f"Expected shares assume experts used in proportion to rank^-{plan.skew:g}, and memory that"]
    notes.append("evicts the least recently used. Weights are loaded; times are for one sequence.")
    notes.append("GB of memory are 1,024^3 bytes and GB of files 1,000^3, as Apple counts them.")
    if plan.group.machines > 1:
        busiest = percent(plan.group.busiest(plan.needs.experts_per_token))
        notes.append(f"Memory is that of each machine. All wait for the busiest, which has {busiest}")
        notes.append(f"of a layer's experts. Assumed: {1e3 * plan.group.latency:g} ms for a message, and 1 GB/s.")
    if not plan.measured:
        notes.append("Predicted from the chip's figures and assumptions; nobody has measured them.")
    else:
        if plan.costs.reads is None and plan.expert_io != "resident":
            notes.append("The checkpoint is not here, so the disk could not be measured.")
        if not plan.costs.timed:
            notes.append(
                "Layers of mlx-lm's network were not timed: predicted from the speeds of products, with an assumed"
            )
            notes.append(f"{1e6 * LAYER_SECONDS:.0f} µs per layer for all other operations.")
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
