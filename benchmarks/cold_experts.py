"""Decoding while part of the experts is not in memory: prefetching, dropping cold experts, preferring cached ones.

    python benchmarks/cold_experts.py [--folder FOLDER] [--runs 3] [--tokens 60] [--cold 0.5]

Before every token a random part of all records is dropped from the page cache (posix_fadvise, Linux), so that every run
misses about the same. Random weights: their residual stream changes faster from layer to layer than a trained model's,
so recall here is a lower bound. The reads are real, what is behind the disk may be another machine's cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import numpy as np
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model
from flash_moe.models import open_model
from flash_moe.nn.prefetch_switch import PrefetchSwitch
from flash_moe.packing.convert import convert

TEXT = text_config(
    hidden_size=512, moe_intermediate_size=512, shared_expert_intermediate_size=512, num_hidden_layers=8,
    num_experts=64, num_experts_per_tok=8,
)  # fmt: skip
PROMPT = [(7 * i) % 256 for i in range(16)]
WARM_UP = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefetch, always on": {"prefetch": True},
    "prefetch": {"prefetch": True},
    "drop_cold_below=0.2": {"drop_cold_below": 0.2},
    "prefer_cached=0.1": {"prefer_cached": 0.1},
    "prefer_cached=0.5": {"prefer_cached": 0.5},
}


class AlwaysOn(PrefetchSwitch):
    """Asks nobody."""

    on = True  # type: ignore[assignment]


class PageCache:
    """Drops random records of a packed checkpoint from the page cache, the same ones in every run."""

    def __init__(self, folder: Path, cold: float) -> None:
        table = open_model(folder).records()
        self._extents = [table.extents(layer, e)[0] for layer in table.layouts for e in range(table.num_experts)]
        self._files = {extent.file: os.open(extent.file, os.O_RDONLY) for extent in self._extents}
        self._cold = cold
        self.stores: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """Everything is in memory, and the same sequence of records begins."""
        self._rng = np.random.default_rng(0)
        for file in self._files:
            file.read_bytes()

    def drop(self) -> None:
        for extent in self._extents:
            if self._rng.random() < self._cold:
                for store in self.stores:  # pages that a process has touched through a mapping stay
                    file = store._reader.file(extent.file)
                    file.unload(extent.offset, extent.nbytes)
                os.posix_fadvise(self._files[extent.file], extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)


def run(model: Model, cache: PageCache, tokens: int) -> dict[str, float]:
    """Means per token: seconds and bytes."""
    cache.restart()
    model.forget()
    stream = model.stream(PROMPT, max_tokens=tokens + WARM_UP, temperature=0)
    times: list[float] = []
    for number in range(tokens + WARM_UP):
        cache.drop()
        start = time.perf_counter()
        stats = next(stream).stats
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
        else:
            before = stats
    found = {
        "ms per token": 1e3 * statistics.mean(times),
        "MB missing": (stats.expert_bytes_missing - before.expert_bytes_missing) / tokens / 1e6,
        "MB asked for": (stats.expert_bytes_requested - before.expert_bytes_requested) / tokens / 1e6,
    }
    if (p := stats.prefetch) is not None:
        assert before.prefetch is not None
        found |= {"MB wasted": (p.bytes_unused - before.prefetch.bytes_unused) / tokens / 1e6}
        found |= {"recall": p.recall or 0.0}
    if (c := stats.choice) is not None:
        found |= {"dropped": c.dropped / c.routed, "swapped": c.swapped / c.routed}
        found |= {"mass lost": c.router_mass_dropped + c.router_mass_swapped}
    return found


def seconds_of(task: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        task()
    return (time.perf_counter() - start) / times


def measure(folder: Path, expert_io: Any, arguments: argparse.Namespace) -> None:
    cache = PageCache(folder, arguments.cold)
    models = {}
    for name, options in OPTIONS.items():
        models[name] = model = Model.load(folder, expert_io=expert_io, **options)
        model.tokenizer.eos_token_ids = frozenset()
        if name.endswith("always on"):
            assert model._decoder.prefetcher is not None
            model._decoder.prefetcher.switch = AlwaysOn()
        cache.stores.append(model._store)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for number in range(arguments.runs + 1):
        for name, model in models.items():
            found = run(model, cache, arguments.tokens)
            if number:
                results[name].append(found)
    plain = statistics.median(found["ms per token"] for found in results["plain"])
    for name, runs in results.items():
        middle = {key: statistics.median(found[key] for found in runs) for key in runs[0]}
        row = [f"{expert_io}: {name}", f"{middle['ms per token'] / plain:.2f}"]
        row += [f"{key} {value:.3g}" for key, value in middle.items()]
        prefetcher = models[name]._decoder.prefetcher
        if prefetcher is not None and not isinstance(prefetcher.switch, AlwaysOn):
            trial = prefetcher.switch.compared
            row.append(f"{prefetcher.switch.decision}, saved {trial.saved:.0%}" if trial else "no trial")
        print(" | ".join(row), flush=True)
    store = models["plain"]._store
    for count in (1, 8):
        asked = seconds_of(lambda count=count: store.in_memory(3, range(20, 20 + count)), 2000)
        print(f"{expert_io}: in_memory of {count} records: {1e6 * asked:.1f} µs")
    for model in models.values():
        model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the model for further runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--cold", type=float, default=0.5, help="share of the records dropped before every token")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "packed").exists():
            write_checkpoint(folder / "float", TEXT)
            convert(folder / "float", folder / "packed", bits=4, group_size=64)
        for expert_io in ("mapped", "slots"):
            measure(folder / "packed", expert_io, arguments)


if __name__ == "__main__":
    main()
