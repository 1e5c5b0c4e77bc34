"""Formats the results of `flash-moe bench` in at most 80 columns."""

from __future__ import annotations

from ..amounts import format_bytes
from ..bench.io import IOReport
from ..bench.phases import ModelReport, Phase, hit_rate
from ..bench.system import machine_name

_LABEL, _CELL, _NARROW = 28, 12, 8  # columns


def model_table(report: ModelReport) -> str:
    """Returns a table of the phases, followed by the layers of decoding."""
    phases, k, own = report.phases, report.experts_per_token, report.model_experts_per_token
    used = f"K={k}" if k == own else f"K={k} of the model's {own}"
    lines = [report.path, f"{used}, experts {report.expert_io}, {machine_name()}", ""]
    lines += [
        _row("", [phase.name for phase in phases]),
        _row("", ["cold" if phase.cold else "warm" for phase in phases]),
        _row("tokens", [f"{phase.tokens:,}" for phase in phases]),
        _row("tokens per second", [f"{1 / phase.token_seconds:.2f}" for phase in phases]),
        _row("ms per token", [_ms(phase.token_seconds) for phase in phases]),
        _row("  waiting for experts", [_ms(phase.fetch_seconds) for phase in phases]),
        _row("  the rest", [_ms(phase.token_seconds - phase.fetch_seconds) for phase in phases]),
        _row("experts per token", [_size(phase, phase.experts.bytes_requested) for phase in phases]),
        _row("  not in the store", [_size(phase, phase.experts.bytes_loaded) for phase in phases]),
        _row("  nor in the page cache", [_size(phase, phase.experts.bytes_missing) for phase in phases]),
        _row("  read, says the system", [_size(phase, phase.disk_bytes) for phase in phases]),
        _row("in memory", [f"{hit_rate(phase.experts):.1%}" for phase in phases]),
    ]
    lines += _layer_rows([phase for phase in phases if phase.name == "decode"])
    leftover = max((phase.leftover_bytes or 0 for phase in phases), default=0)
    if leftover:
        lines += ["", f"Not quite cold: the system kept {format_bytes(leftover)} of the experts in memory."]
    if not any(phase.cold for phase in phases):
        lines += ["", "A resident store holds all experts: nothing could be cold."]
    return "\n".join(lines)


def io_table(report: IOReport) -> str:
    """Returns raw reads, cold and warm, by size and threads; then the stores."""
    threads = sorted({speed.threads for speed in report.raw})
    sizes = sorted({speed.request_bytes for speed in report.raw})
    found = {(speed.request_bytes, speed.threads): speed for speed in report.raw}
    record = "" if report.record_bytes is None else f", records of {format_bytes(report.record_bytes)}"
    lines = [report.path, f"{format_bytes(report.nbytes)} to read from{record}, {machine_name()}"]
    for state in ("cold", "warm"):
        title = f"plain reads, {state}, GB/s; threads:"
        lines += ["", f"{title:<36}" + "".join(f"{n:>{_NARROW}}" for n in threads)]
        for size in sizes:
            cells = [f"{getattr(found[size, n], state) / 1e9:.2f}" for n in threads]
            label = format_bytes(size) + (" (a record)" if size == report.record_bytes else "")
            lines.append(f"  {label:<34}" + "".join(f"{cell:>{_NARROW}}" for cell in cells))
    if report.fetches:
        lines += ["", f"{'the library, GB/s':<36}{'cold':>{_NARROW}}{'warm':>{_NARROW}}"]
        for fetch in report.fetches:
            cold = "-" if fetch.cold is None else f"{fetch.cold / 1e9:.2f}"
            what = f"{fetch.store}, {fetch.records} record{'s' * (fetch.records > 1)} at once"
            lines.append(f"  {what:<34}{cold:>{_NARROW}}{fetch.warm / 1e9:>{_NARROW}.2f}")
    return "\n".join([*lines, "", _coldness(report)])


def _coldness(report: IOReport) -> str:
    if report.really_cold:
        return "Cold: the page cache held none of it; what the disk itself caches is its own."
    least = min(speed.missing for speed in report.raw)
    return f"Cold is not cold here: when it began, up to {1 - least:.0%} was still in the page cache."


def _layer_rows(phases: list[Phase]) -> list[str]:
    states = ["cold" if phase.cold else "warm" for phase in phases]
    titles = [title for state in states for title in (f"{state} ms", "waiting", "in memory")]
    lines = ["", f"{'layer':<8}" + "".join(f"{title:>{_CELL}}" for title in titles)]
    for layer in phases[0].layers:
        cells = []
        for phase in phases:
            stats = phase.layers[layer]
            cells += [_ms(stats.seconds / phase.tokens), _ms(stats.fetch_seconds / phase.tokens)]
            cells.append(f"{hit_rate(stats):.1%}")
        lines.append(f"{layer:<8}" + "".join(f"{cell:>{_CELL}}" for cell in cells))
    return [*lines, "Layer 0 includes the output head and the choice of the token before."]


def _row(label: str, cells: list[str]) -> str:
    return (f"{label:{_LABEL}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)).rstrip()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _size(phase: Phase, nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes / phase.tokens)
