"""The Gated DeltaNet step against float64, alone and over hundreds of tokens."""

from __future__ import annotations

from collections.abc import Callable

import emulator
import mlx.core as mx
import numpy as np
import pytest
import sequence_oracles as oracle
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.ops.delta_net_step import (
    Step,
    delta_net_step_kernel,
    delta_net_step_reference,
    pack_constants,
)

EPS = {"l2_eps": 1e-6, "eps": 3e-6}
RAGGED, LONG, REAL = (2, 6, 20, 9, 3), (1, 2, 132, 37, 2), (2, 8, 128, 128, 4)  # Hk, Hv, Dk, Dv, taps
CASES = [
    *[(RAGGED, dtype, "check", "random") for dtype in DTYPES],
    (LONG, "bf16", "check", "random"),
    *[(REAL, dtype, "fast", "reverse") for dtype in DTYPES],
    *[(REAL, dtype, "nocontract", "forward") for dtype in DTYPES],
]
Arrays = dict[str, mx.array]


def weights(sizes: tuple[int, ...], dtype: mx.Dtype, rng: np.random.RandomState) -> Arrays:
    key_heads, heads, dk, dv, taps = sizes
    channels = 2 * key_heads * dk + heads * dv
    return {
        "conv_weight": random(rng, (taps, channels), dtype, 0.5),
        "log_decay": -mx.exp(random(rng, (heads,), mx.float32)),
        "dt_bias": random(rng, (heads,), mx.float32),
        "norm_weight": random(rng, (dv,), dtype),
    }


def token(sizes: tuple[int, ...], dtype: mx.Dtype, rng: np.random.RandomState) -> Arrays:
    key_heads, heads, dk, dv, _ = sizes
    widths = {"qkv": 2 * key_heads * dk + heads * dv, "z": heads * dv, "b": heads, "a": heads}
    return {name: random(rng, (1, width), dtype) for name, width in widths.items()}


def state(sizes: tuple[int, ...], dtype: mx.Dtype, rng: np.random.RandomState) -> Arrays:
    key_heads, heads, dk, dv, taps = sizes
    channels = 2 * key_heads * dk + heads * dv
    return {
        "conv_state": random(rng, (taps - 1, channels), dtype),
        "state": random(rng, (heads, dv, dk), mx.float32, 0.3),
    }


def exact(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: float64(array) for name, array in arrays.items()}


def step(arrays: Arrays, key_heads: int, path: Callable[..., Step]) -> Step:
    return path(
        mx.concatenate([arrays[name] for name in ("qkv", "z", "b", "a")], axis=-1),
        arrays["conv_state"], arrays["state"], conv_weight=arrays["conv_weight"],
        constants=pack_constants(arrays["log_decay"], arrays["dt_bias"], arrays["norm_weight"], **EPS),
        key_heads=key_heads,
    )  # fmt: skip


def check(arrays: Arrays, key_heads: int, path: Callable[..., Step]) -> None:
    y, conv, new_state = step(arrays, key_heads, path)
    expected = oracle.delta_net_step(**exact(arrays), key_heads=key_heads, **EPS)
    assert y.dtype == conv.dtype == arrays["qkv"].dtype
    np.testing.assert_array_equal(float64(conv), expected[1])
    assert error(new_state, expected[2], 16 * np.abs(expected[2]).max()) <= 1
    assert error(y, expected[0], 64 * np.abs(expected[0]).max()) <= 1


@pytest.mark.parametrize("sizes, dtype, mode, order", CASES, ids=str)
def test_delta_net_step(sizes: tuple[int, ...], dtype: str, mode: str, order: str) -> None:
    rng = np.random.RandomState(len(dtype))
    parts = [make(sizes, DTYPES[dtype], rng) for make in (weights, token, state)]
    arrays = {name: array for part in parts for name, array in part.items()}
    with emulator.options(mode=mode, order=order):
        check(arrays, sizes[0], delta_net_step_kernel)
    check(arrays, sizes[0], delta_net_step_reference)


@pytest.mark.parametrize("t", [-120.0, -18.0, -5.0, 0.0, 20.0, 120.0])
def test_extreme_gates(t: float) -> None:
    """softplus keeps its digits where it is tiny, and nothing overflows."""
    rng = np.random.RandomState(1)
    arrays = {**weights(RAGGED, mx.float32, rng), **token(RAGGED, mx.float32, rng), **state(RAGGED, mx.float32, rng)}
    for name in ("a", "b", "z"):
        arrays[name] = mx.full(arrays[name].shape, t)
    arrays["dt_bias"] = mx.zeros((RAGGED[1],))
    arrays["log_decay"] = mx.full((RAGGED[1],), -np.clip(np.exp(-t), 1.0, 1e20))  # brings a tiny softplus up to 1
    check(arrays, RAGGED[0], delta_net_step_kernel)
    check(arrays, RAGGED[0], delta_net_step_reference)


def test_a_sequence_of_zeros_stays_finite() -> None:
    rng = np.random.RandomState(1)
    arrays = {**weights(RAGGED, mx.bfloat16, rng), **token(RAGGED, mx.bfloat16, rng), **state(RAGGED, mx.bfloat16, rng)}
    for name in ("qkv", "conv_state", "state"):
        arrays[name] = mx.zeros_like(arrays[name])
    check(arrays, RAGGED[0], delta_net_step_kernel)


@pytest.mark.parametrize("tokens", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_drift(tokens: int) -> None:
    """bf16 inputs, float32 state: after many tokens the state is as near to float64 as after one, but for roundings."""
    sizes = (2, 4, 32, 16, 4)
    rng = np.random.RandomState(5)
    fixed = weights(sizes, mx.bfloat16, rng)
    fixed["log_decay"] = fixed["log_decay"] * 0.02  # a memory of many tokens
    found = state(sizes, mx.bfloat16, rng)
    expected = exact(found)
    for _ in range(tokens):
        new = token(sizes, mx.bfloat16, rng)
        y, conv, s = step(new | found | fixed, sizes[0], delta_net_step_kernel)
        want = oracle.delta_net_step(**exact(new), **expected, **exact(fixed), key_heads=sizes[0], **EPS)
        found, expected = {"conv_state": conv, "state": s}, {"conv_state": want[1], "state": want[2]}
        assert error(y, want[0], 512 * np.abs(want[0]).max()) <= 1
    assert error(s, want[2], 64 * np.abs(want[2]).max()) <= 1
