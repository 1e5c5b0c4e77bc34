"""Plots a measurement: milliseconds and hit rate of every layer in decoding."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import ArgumentError
from .phases import ModelReport, Phase, hit_rate

_COLOURS = {True: "#c44e52", False: "#4c72b0"}  # cold, warm


def require_matplotlib() -> None:
    """Raises ArgumentError if matplotlib, an optional dependency, is not installed."""
    if find_spec("matplotlib") is None:
        raise ArgumentError("a plot needs matplotlib, which is not installed: pip install 'flash-moe[plot]'")


def plot(report: ModelReport, file: Path) -> None:
    """Writes a plot to a file. The suffix of the file determines the format.

    Raises:
        ArgumentError: matplotlib is not installed, or does not support the format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    phases = [phase for phase in report.phases if phase.name == "decode"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    times, hits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 0.8 / len(phases)
    for number, phase in enumerate(phases):
        layers = [i for i, stats in phase.layers.items() if stats.fetches]
        at = [i + (number - (len(phases) - 1) / 2) * width for i in layers]
        wait = [1e3 * phase.layers[i].fetch_seconds / phase.tokens for i in layers]
        rest = [1e3 * phase.layers[i].seconds / phase.tokens - w for i, w in zip(layers, wait, strict=True)]
        colour = _COLOURS[phase.cold]
        times.bar(at, wait, width, color=colour, label=f"{_named(phase)}: waiting for experts")
        times.bar(at, rest, width, bottom=wait, color=colour, alpha=0.35, label=f"{_named(phase)}: the rest")
        hits.bar(at, [100 * hit_rate(phase.layers[i]) for i in layers], width, color=colour)
    k, own = report.experts_per_token, report.model_experts_per_token
    speeds = ", ".join(f"{1 / phase.token_seconds:.1f} tokens/s {_named(phase)}" for phase in phases)
    times.set_title(
        f"{Path(report.path).name}: decoding with K={k} of {own}, experts {report.expert_io}, {speeds}", loc="left"
    )
    times.set_ylabel("ms per token")
    times.legend(frameon=False, ncols=len(phases), loc="upper center", bbox_to_anchor=(0.5, -0.02))
    hits.set_ylabel("% in memory")
    hits.set_ylim(0, 105)
    hits.set_xlabel("layer")
    hits.xaxis.get_major_locator().set_params(integer=True)
    for axes in (times, hits):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise ArgumentError(f"{file} cannot be written as a picture ({error}); name it something.png") from error


def _named(phase: Phase) -> str:
    return "cold" if phase.cold else "warm"
