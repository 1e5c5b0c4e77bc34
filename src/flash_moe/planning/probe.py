"""Times layers of a model's sizes with random weights, without reads of experts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.records import RecordTable
from ..dtypes import DTYPES
from ..experts.host_memory import keep_on_host
from ..experts.opening import fetch_capacity
from ..experts.slots import slot_count
from ..experts.store import ExpertStore
from ..models import ModelFiles
from ..nn.timed import TimedLayer
from ..ops.dispatch import kernels
from ..record import RecordLayout
from .costs import LayerCost
from .needs import Kind

_COPIES = 4  # layers of a kind that alternate, so that weights do not stay in the processor's cache
_MOST_BYTES = 128 << 20  # maximum bytes of their weights, or one layer
_BANK_BYTES = 128 << 20  # records of a group in a prompt
_CONTEXT = 1024  # context lengths at which attention is timed
_TOKENS = 64  # tokens of a chunk in which experts are timed
_LONG = 0.2  # seconds; after a longer run, no larger size is tried

Bank = mx.array | list[np.ndarray]  # rows of one array, or the bytes of each record
_BLOCK = 1 << 16  # numbers, which repeat
_MOST_RUNS, _ENOUGH = 12, 0.3  # maximum number of runs, and seconds after which no run begins
_FIRST_RUNS = 3  # first runs that are not counted if they are fast, because they create traces and graphs


class _BankStore(ExpertStore):
    """A store without reads: for any expert, it returns the next row of a bank.

    For slots, the records of a prompt are adjacent and those of a token are not, and the bank has the same kind of
    memory as the real one. For mapped records, each record is a separate array.
    """

    def __init__(self, table: RecordTable, k: int, expert_io: str) -> None:
        super().__init__(table.layouts, fetch_capacity(table, k))
        self._k, self._mapped = k, expert_io == "mapped"
        self._passes_on = expert_io == "slots" and slot_count(table, self.capacity) < table.count
        self._rows = max(2 * k, _BANK_BYTES // max(1, table.max_stride))
        self._banks: list[tuple[RecordLayout, Bank]] = []  # one bank per layout
        self._next = 0

    def _arrive(self, layer: int, experts: Sequence[int]) -> Iterator[Any]:
        count, bank = len(experts), self._bank(self.layouts[layer])
        step = 2 if count <= self._k else 1
        first = self._next if self._next + count * step <= self._rows else 0
        self._next = first + count * step
        rows = ((first + step * i) % self._rows for i in range(count))
        return rows if isinstance(bank, mx.array) else (bank[row] for row in rows)

    def _bank_of(self, layer: int) -> mx.array | None:
        bank = self._bank(self.layouts[layer])
        return bank if isinstance(bank, mx.array) else None

    def _bank(self, layout: RecordLayout) -> Bank:
        for known, bank in self._banks:
            if known == layout:
                return bank
        bank = made = made_up_records(layout, self._rows)
        if self._mapped:
            bank = list(np.array(made, copy=False).view(np.uint8))
        elif self._passes_on:
            keep_on_host(np.array(made, copy=False).view(np.uint8))
        self._banks.append((layout, bank))
        return bank

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Does nothing, because all records are in memory."""

    def in_memory(self, layer: int, experts: Sequence[int]) -> list[bool]:
        return [True] * len(experts)

    def close(self) -> None:
        """Does nothing: the store has no resources."""


class Probe:
    """Layers of every kind of a checkpoint, with random weights, from its headers alone.

    Args:
        dtype: dtype of activations.
        expert_io: the kind of store to imitate.
    """

    def __init__(
        self, checkpoint: ModelFiles, table: RecordTable, experts_per_token: int, dtype: mx.Dtype, expert_io: str
    ) -> None:
        self._checkpoint, self._shape, self._dtype = checkpoint, checkpoint.shape, dtype
        self._k, self._store = experts_per_token, _BankStore(table, experts_per_token, expert_io)
        self._layers: dict[Kind, list[TimedLayer]] = {}
        self._attends: dict[Kind, bool] = {}
        for i in range(checkpoint.dimensions.num_hidden_layers):
            work = checkpoint.layer_work(i, dtype.size)
            kind = Kind(work.mixer, work.sparse)
            self._attends[kind] = work.pair_flops > 0
            members = self._layers.setdefault(kind, [])
            if len(members) < _COPIES and (not members or self._nbytes(i) * (len(members) + 1) <= _MOST_BYTES):
                members.append(self._layer(i))

    def layer_costs(self) -> dict[Kind, LayerCost]:
        """Times every kind of layer."""
        with kernels(None):
            return {kind: self._cost(members, kind) for kind, members in self._layers.items()}

    def expert_costs(self) -> tuple[float, float]:
        """Returns the seconds of a prompt's chunk per used expert, and per pair of token and expert."""
        sparse = next((m for kind, m in self._layers.items() if kind.sparse), None)
        if sparse is None:
            return 0.0, 0.0
        moe, k = sparse[0], self._k

        def seconds(tokens: int, touched: int) -> float:
            x = self._input(tokens)
            ids = mx.array((np.arange(tokens * k) % touched).reshape(tokens, k).astype(np.uint32))
            weights = mx.full((tokens, k), 1 / k)
            return run_seconds(lambda: moe.experts(x, ids, weights, x))

        with kernels(None):
            few = min(k, self._shape.num_experts)
            tokens, once = _TOKENS, seconds(_TOKENS, few)
            many = min(self._shape.num_experts, tokens * k, max(4 * few, int(few * _LONG / once)))
            base, wide, long = seconds(tokens, few), seconds(tokens, many), seconds(4 * tokens, few)
        row = max(0.0, (long - base) / (3 * tokens * k))
        record = (wide - base) / (many - few) if many > few else (base - tokens * k * row) / few
        return max(0.0, record), row

    def _cost(self, members: list[TimedLayer], kind: Kind) -> LayerCost:
        token = self._token_seconds(members, 0)
        key = max(0.0, (self._token_seconds(members, _CONTEXT) - token) / _CONTEXT) if self._attends[kind] else 0.0

        def chunk(tokens: int, context: int = 0) -> float:
            return median(run_seconds(partial(self._chunk, m, tokens, context)) for m in members[:2])

        tokens = self._affordable(members[0])
        short, long = chunk(tokens), chunk(4 * tokens)
        pair = max(0.0, (chunk(tokens, _CONTEXT) - short) / (tokens * _CONTEXT)) if self._attends[kind] else 0.0
        per_token = max(0.0, (long - short - pair * 15 * tokens * tokens) / (3 * tokens))
        return LayerCost(token, key, max(0.0, short - tokens * (per_token + pair * tokens)), per_token, pair)

    def _token_seconds(self, members: list[TimedLayer], context: int) -> float:
        """Measures the seconds of one token in one layer, in a chain of layers as in a decoder."""
        caches = [layer.new_cache(context) for layer in members]
        x = self._input(1)

        def chain() -> mx.array:
            y = x
            for layer, cache in zip(members, caches, strict=True):
                y = layer(y, cache)
            return y

        return run_seconds(chain) / len(members)

    def _chunk(self, member: TimedLayer, tokens: int, context: int) -> Sequence[mx.array]:
        """Runs a chunk of a prompt through a layer, without its routed experts."""
        return member.front(self._input(tokens), member.new_cache(context))

    def _affordable(self, member: TimedLayer) -> int:
        """Returns a number of tokens per chunk that does not take long: 16, 32 or 64."""
        for tokens in (16, 32):
            if run_seconds(partial(self._chunk, member, tokens, 0)) > _LONG:
                return tokens
        return 64

    def _input(self, tokens: int) -> mx.array:
        return made_up_array("F32", (tokens, self._shape.hidden_size)).astype(self._dtype)

    def _nbytes(self, layer: int) -> int:
        prefix = f"layers.{layer}."
        return sum(info.nbytes for name, info in self._checkpoint.resident.items() if name.startswith(prefix))

    def _layer(self, i: int) -> TimedLayer:
        prefix = f"layers.{i}."
        stored = {
            name: made_up_array(info.dtype, info.shape)
            for name, info in self._checkpoint.resident.items()
            if name.startswith(prefix)
        }
        return self._checkpoint.timed_layer(i, stored, self._store, self._k, self._dtype)


def made_up_array(dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Returns an array of a safetensors dtype: random bits for U32, numbers around 0.01 for floats."""
    numbers = np.resize(_block(dtype), math.prod(shape)).reshape(shape)
    array = mx.array(numbers)
    return array.view(DTYPES[dtype]) if dtype in ("BF16", "F16") else array


def made_up_records(layout: RecordLayout, count: int) -> mx.array:
    """Returns a bank of identical records, [count, words] uint32."""
    record = np.zeros(layout.stride, np.uint8)
    for part in layout.parts:
        numbers = np.resize(_block(part.dtype), math.prod(part.shape))
        record[part.offset : part.offset + part.nbytes] = numbers.view(np.uint8)
    bank = mx.array(np.tile(record.view(np.uint32), (count, 1)))
    mx.eval(bank)
    return bank


def _block(dtype: str) -> np.ndarray:
    """Returns a block of numbers of a dtype; 16-bit floats as uint16."""
    rng = np.random.default_rng(0)
    if dtype == "U8":  # scales of one byte: about 0.01 as e4m3, and finite as e8m0
        return np.full(_BLOCK, 0x06, np.uint8)
    if dtype == "U32":
        return rng.integers(0, 1 << 32, _BLOCK, dtype=np.uint32)
    floats = (0.01 * rng.standard_normal(_BLOCK)).astype(np.float32)
    if dtype == "BF16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(np.float16).view(np.uint16) if dtype == "F16" else floats


def run_seconds(run: Callable[[], object]) -> float:
    """Returns the median seconds of a run and its evaluation, without the first runs; slow runs are repeated less
    often.
    """
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < _FIRST_RUNS + _MOST_RUNS and sum(seconds[1:]) < _ENOUGH):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return median(seconds[min(_FIRST_RUNS, len(seconds) - 1) :])
