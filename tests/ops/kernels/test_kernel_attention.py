"""Decode attention over a cache, split into chunks and joined, against float64."""

from __future__ import annotations

from collections.abc import Callable

import emulator
import mlx.core as mx
import numpy as np
import pytest
import sequence_oracles as oracle
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.ops import decode_attention as module
from flash_moe.ops.decode_attention import (
    cache_sizes,
    decode_attention_kernel,
    decode_attention_reference,
    split,
)

RAGGED, WIDE, REAL = (6, 2, 64), (5, 1, 96), (32, 2, 256)  # Hq, Hkv, D
CASES = [
    *[(RAGGED, 45, 64, dtype, "check", "random") for dtype in DTYPES],
    *[(RAGGED, length, 320, "bf16", "check", "random") for length in (1, 33, 64, 65, 300)],
    (WIDE, 77, 80, "bf16", "check", "random"),
    ((16, 2, 128), 70, 96, "bf16", "check", "random"),
    *[(REAL, 300, 512, dtype, "fast", "reverse") for dtype in DTYPES],
    *[(REAL, 300, 512, dtype, "nocontract", "forward") for dtype in DTYPES],
    (REAL, 5000, 5120, "bf16", "fast", "forward"),
]


def inputs(
    sizes: tuple[int, int, int], length: int, capacity: int, dtype: mx.Dtype, spread: float = 1.0
) -> tuple[mx.array, ...]:
    """q, keys, values and gate; what the cache holds past ``length`` would show in any result."""
    heads, kv_heads, dim = sizes
    rng = np.random.RandomState(length)
    past = mx.arange(capacity)[:, None] >= length
    keys, values = (mx.where(past, float("nan"), random(rng, (kv_heads, capacity, dim), dtype)) for _ in "kv")
    return (
        random(rng, (heads, 1, dim), dtype, spread), keys.astype(dtype), values.astype(dtype),
        random(rng, (1, heads * dim), dtype, 3.0),
    )  # fmt: skip


def check(arrays: tuple[mx.array, ...], length: int, path: Callable[..., mx.array]) -> None:
    q, keys, values, gate = arrays
    scale = q.shape[-1] ** -0.5
    exact = [float64(a) for a in (q, keys, values)]
    expected = oracle.decode_attention(*exact, length, float64(gate), scale)
    group = len(exact[0]) // len(exact[1])
    scores = np.abs(np.repeat(exact[1][:, :length], group, 0)) @ np.abs(exact[0].swapaxes(1, 2)) * scale
    allowed = (16 + 2 * scores.max()) * np.abs(exact[2][:, :length]).max()  # an error of a score is a factor of e^error
    y = path(q, keys, values, length, gate, scale)
    assert y.dtype == q.dtype
    assert error(y, expected, allowed) <= 1


def by_kernel(q: mx.array, keys: mx.array, values: mx.array, length: int, gate: mx.array, scale: float) -> mx.array:
    return decode_attention_kernel(q, keys, values, cache_sizes(length, keys), gate, scale)


@pytest.mark.parametrize("sizes, length, capacity, dtype, mode, order", CASES, ids=str)
def test_decode_attention(
    sizes: tuple[int, int, int], length: int, capacity: int, dtype: str, mode: str, order: str
) -> None:
    arrays = inputs(sizes, length, capacity, DTYPES[dtype])
    with emulator.options(mode=mode, order=order):
        check(arrays, length, by_kernel)
    check(arrays, length, decode_attention_reference)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_flat_and_peaked_softmax(spread: float) -> None:
    check(inputs(RAGGED, 300, 320, mx.float32, spread), 300, by_kernel)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = inputs(RAGGED, 1000, 1024, mx.bfloat16)
    for threadgroups in (2, 4, 6, 64):
        monkeypatch.setattr(module, "_THREADGROUPS", threadgroups)
        check(arrays, 1000, by_kernel)


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 200])
def test_split_covers_the_context(kv_heads: int) -> None:
    for length in [*range(1, 300), 4095, 4096, 4097, 262144]:
        chunk, chunks = split(length, kv_heads)
        assert chunk % 32 == 0
        assert (chunks - 1) * chunk < length <= chunks * chunk
        assert chunks <= max(1, 128 // kv_heads)


@pytest.mark.parametrize("sizes", [(2, 1, 80), (64, 1, 256)], ids=str)
def test_unsuitable_heads_are_named(sizes: tuple[int, int, int]) -> None:
    q, keys, values, gate = inputs(sizes, 3, 4, mx.float32)
    with pytest.raises(ValueError, match=f"found {sizes[0]} query heads of {sizes[2]} elements"):
        by_kernel(q, keys, values, 3, gate, 1.0)
    assert not module.supports(*sizes)
    assert module.supports(*RAGGED)
