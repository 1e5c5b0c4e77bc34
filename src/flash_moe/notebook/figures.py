"""Plots: the parts of the time, the share in memory, and the uses of experts."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import ArgumentError

_WAIT, _REST, _MEMORY = "#c44e52", "#4c72b0", "#2ea043"
_INK = "#808080"  # readable on white and on black


class Picture:
    """A figure of matplotlib that a notebook can display, with a transparent background.

    Attributes:
        figure: the figure, which you can change or save.
    """

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the figure to a file. The suffix of the file determines the format."""
        self.figure.savefig(file, dpi=150)

    def __repr__(self) -> str:
        return f"Picture({' and '.join(axes.get_title(loc='left') or 'untitled' for axes in self.figure.axes)})"

    def _repr_png_(self) -> bytes:
        target = io.BytesIO()
        self.figure.savefig(target, format="png", dpi=110, transparent=True)
        return target.getvalue()


def times_of(stats: Any) -> Picture:
    """Plots the parts of the time of a reply, and the share of experts in memory; see :meth:`flash_moe.Stats.plot`."""
    figure = _figure(7.5, 3.0)
    times, memory = figure.subplots(2, 1, height_ratios=(2, 1))
    tokens = max(stats.generated_tokens - 1, 1)
    waits = stats.fetch_seconds - stats.decode_fetch_seconds, stats.decode_fetch_seconds
    bars = [
        ("prompt", 1e3 * stats.prompt_seconds / max(stats.prompt_tokens - stats.reused_tokens, 1), waits[0]),
        ("decoding", 1e3 * stats.decode_seconds / tokens, waits[1]),
    ]
    counts = max(stats.prompt_tokens - stats.reused_tokens, 1), tokens
    for (name, whole, wait), count in zip(bars, counts, strict=True):
        waited = min(1e3 * wait / count, whole)
        times.barh(name, waited, color=_WAIT, label="waiting for experts" if name == "prompt" else None)
        times.barh(name, whole - waited, left=waited, color=_REST, label="the rest" if name == "prompt" else None)
    times.invert_yaxis()
    times.set_title("ms per token", loc="left")
    times.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), labelcolor=_INK)
    memory.barh("experts", 100 * stats.hit_rate, color=_MEMORY)
    memory.set_xlim(0, 100)
    memory.set_title("% of expert bytes in memory", loc="left")
    return _finished(figure)


def layers_of(by_layer: Mapping[int, Any]) -> Picture:
    """Plots the hits and waiting times of the layers; see :meth:`flash_moe.experts.store.ExpertStore.plot`."""
    found = {layer: stats for layer, stats in by_layer.items() if stats.fetches}
    figure = _figure(8.0, 4.0)
    times, hits = figure.subplots(2, 1, sharex=True)
    layers = list(found)
    times.bar(layers, [1e3 * stats.fetch_seconds / stats.fetches for stats in found.values()], color=_WAIT)
    times.set_title("ms of waiting per fetch", loc="left")
    hits.bar(layers, [100 * (1 - s.bytes_missing / max(s.bytes_requested, 1)) for s in found.values()], color=_MEMORY)
    hits.set_ylim(0, 105)
    hits.set_title("% of expert bytes in memory", loc="left")
    hits.set_xlabel("layer")
    hits.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure)


def uses_of(counts: Any) -> Picture:
    """Plots the uses of experts for counts [L, E]: a row per layer, with its experts from the most to the least used."""
    figure = _figure(8.0, 3.6)
    axes = figure.subplots()
    ordered = -np.sort(-counts, axis=1)
    image = axes.imshow(ordered, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_title("uses of each expert, by layer", loc="left")
    axes.set_xlabel("experts of the layer, the most used first")
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(colors=_INK)
    bar.outline.set_visible(False)
    return _finished(figure)


def _figure(width: float, height: float) -> Any:
    if find_spec("matplotlib") is None:
        raise ArgumentError("a plot needs matplotlib, which is not installed: pip install 'flash-moe[plot]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Any) -> Picture:
    for axes in figure.axes:
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(colors=_INK)
        for label in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):
            label.set_color(_INK)
    return Picture(figure)
