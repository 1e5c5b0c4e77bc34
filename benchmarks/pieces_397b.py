"""What the parts of a token cost by themselves on this machine: copies, reads, and the pieces of a layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe import Model
from flash_moe.config import FULL_ATTENTION
from flash_moe.experts.mapped_file import MappedFile
from flash_moe.experts.reader import REQUEST
from flash_moe.models import open_model
from flash_moe.nn.cache import DeltaCache, layer_cache
from flash_moe.ops.dispatch import kernels, on_gpu

REPEATS = 5
_WARM_BYTES = 64 << 20


def median_seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of a run and the evaluation of what it returns, after two that are not counted."""
    times = []
    for number in range(repeats + 2):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        if number > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_copy(nbytes: int) -> float:
    """Bytes read and written per second by copies of an array on the device."""
    a, count = mx.zeros(nbytes // 4), 8
    mx.eval(a)
    return 2 * a.nbytes * count / median_seconds(lambda: [a + float(i) for i in range(1, count + 1)])


def page_cache_read(file: MappedFile, target: np.ndarray, threads: int) -> float:
    """Bytes per second of parallel reads of a file that the page cache holds, into ``target``, from its beginning on."""
    size = min(target.nbytes, file.size) // REQUEST * REQUEST
    starts = range(0, size, REQUEST)
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda at: file.read_into(target[at : at + REQUEST], at), starts))
        return size / (time.perf_counter() - start)


def warm_contents(folder: Path) -> None:
    """Reads a model's files of experts into the page cache, each content once."""
    files = {path.stat().st_ino: path for path in open_model(folder).records().files}
    target = np.empty(_WARM_BYTES, np.uint8)
    for path in files.values():
        with path.open("rb", buffering=0) as file:
            while file.readinto(target):
                pass


def device_read(array: mx.array) -> float:
    """Bytes per second at which the device copies an array that lies where the host has just written it."""
    start = time.perf_counter()
    mx.eval(array + 1)
    mx.synchronize()
    return array.nbytes / (time.perf_counter() - start)


def layers_alone(model: Model, kind: str) -> tuple[float, int]:
    """Seconds of all layers of a kind without their experts for one token without context, and how many layers they are.

    Mixers, norms and routers, in a chain as in a decoder; one trace, one wait. Where there are no kernels, the shared
    experts are among them.
    """
    decoder, config = model._decoder, model.config
    members = [i for i, found in enumerate(config.layer_types) if found == kind]
    states = {i: layer_cache(config, i, decoder.dtype).arrays for i in members} if kind != FULL_ATTENTION else {}
    mx.eval(states)

    def chain(x: mx.array) -> list[mx.array]:
        rest = []
        for i in members:
            cache = layer_cache(config, i, decoder.dtype)
            if isinstance(cache, DeltaCache):
                cache.advance(0, *states[i])
            *others, x = decoder.layers[i].front(x, cache)
            rest += [*others, *cache.arrays]
        return [*rest, x]

    x = mx.ones((1, config.hidden_size), dtype=decoder.dtype)
    with kernels(None):
        run = mx.compile(chain) if on_gpu() else chain
        return median_seconds(lambda: run(x)), len(members)


def experts_alone(model: Model, rounds: int) -> float:
    """Seconds of the experts of one layer and one token, from random rows of the store's bank, which stay where they are."""
    moe, k, store = model._decoder.layers[0].mlp, model.experts_per_token, model.expert_store
    bank, rng = store._bank.bank, np.random.default_rng(0)
    x = mx.ones((1, model.config.hidden_size), dtype=model._decoder.dtype)
    choices = [mx.array(rng.permutation(store._count)[:k].astype(np.uint32)) for _ in range(rounds)]
    with kernels(None):
        fused = moe.uses_kernel(x) and moe._record is not None
        weights = mx.full((1, k + fused), 1 / k)

        def one(rows: mx.array) -> mx.array:
            return moe.of_bank(x, rows, weights, x, bank)

        mx.eval(choices, weights)
        run = mx.compile(lambda *sets: [one(rows) for rows in sets]) if on_gpu() else lambda *sets: list(map(one, sets))
        return median_seconds(lambda: run(*choices)) / rounds


def head_alone(logits: Callable[[mx.array], mx.array], hidden: int, dtype: mx.Dtype, rounds: int) -> float:
    """Seconds of an output head for one token."""
    rows = [mx.full((1, hidden), float(i + 1), dtype=dtype) for i in range(rounds)]
    mx.eval(rows)
    return median_seconds(lambda: [logits(x) for x in rows]) / rounds


def resident_bytes(model: Model) -> dict[str, int]:
    """Bytes that a token must read of always-read weights as stored, by piece; states of delta nets are written, too."""
    config = model.config
    linear = [kind != FULL_ATTENTION for kind in config.layer_types]
    found = {"delta-net layers": 0, "attention layers": 0, "experts": 0, "head": 0}
    for name, info in open_model(model.path).resident.items():
        if name.startswith("layers."):
            piece = "delta-net layers" if linear[int(name.split(".")[1])] else "attention layers"
            found["experts" if ".shared_expert." in name else piece] += info.nbytes
        elif name.startswith("lm_head"):
            found["head"] += info.nbytes
    caches = [layer_cache(config, i, model._decoder.dtype) for i in range(config.num_hidden_layers) if linear[i]]
    found["delta-net layers"] += 2 * sum(array.nbytes for cache in caches for array in cache.arrays)
    return found


def reads_alone(model: Model) -> float:
    """Seconds per byte of fetching all records of all layers as a prompt does, with nothing computed."""
    store = model.expert_store
    start, before = time.perf_counter(), store.stats.bytes_loaded
    fetch_everything(model)
    return (time.perf_counter() - start) / (store.stats.bytes_loaded - before)


def fetch_everything(model: Model) -> None:
    """Fetches every record, as many at once as the store takes."""
    store, experts = model.expert_store, model.config.num_experts
    for layer in store.layouts:
        for first in range(0, experts, store.capacity):
            store.fetch(layer, range(first, min(first + store.capacity, experts)))


def replay(model: Model, tokens: Sequence[int]) -> list[float]:
    """Seconds of each of these tokens, decoded one after the other from an empty context."""
    engine, cache, seconds = model._engine, model._decoder.new_cache(), []
    model.expert_store.mark()
    for token in tokens:
        start = time.perf_counter()
        int(mx.argmax(engine._run([token], cache, 1)[0]))
        seconds.append(time.perf_counter() - start)
    return seconds
