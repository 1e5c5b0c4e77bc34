"""Experts, Gated DeltaNet, attention, norm and router on the CPU against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from flash_moe.ops.cpu.attention import Attention
from flash_moe.ops.cpu.experts import Experts, Rows, Swiglu
from flash_moe.ops.cpu.formats import Format
from flash_moe.ops.cpu.functions import exp
from flash_moe.ops.cpu.gated_delta import GatedDelta
from flash_moe.ops.cpu.norm import rms_norm
from flash_moe.ops.cpu.router import route
from flash_moe.ops.cpu.workers import Workers

RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def swiglu_of(parts: list[Any], x: np.ndarray) -> np.ndarray:
    gate, up = x @ parts[0].values.T, x @ parts[1].values.T
    return (gate * sigmoid(gate) * up) @ parts[2].values.T


EXPERTS = {
    "affine": [Format("BF16", 4, 64), Format("BF16", 4, 64), Format("BF16", 3, 32)],
    "small floats": [Format("U8", 4, 16, "nvfp4", True), Format("U8", 4, 32, "mxfp4"), Format("U8", 8, 32, "mxfp8")],
}


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("formats", EXPERTS.values(), ids=EXPERTS)
def test_experts(stored: Any, pools: list[Workers], formats: list[Format], tokens: int) -> None:
    hidden, width, shared_width = 128, 192, 64
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    experts = [[stored(f, *shape, seed=3 * e + i) for i, (f, shape) in enumerate(zip(formats, shapes, strict=True))]
               for e in range(3)]  # fmt: skip
    shared = [stored(Format("F32"), *shape, seed=90) for shape in
              ((shared_width, hidden), (shared_width, hidden), (hidden, shared_width))]  # fmt: skip
    records = []
    for parts in experts:
        flat = [a.reshape(-1).view(np.uint8) for p in parts for a in p.arrays]
        starts = np.cumsum([0, *(-(-a.size // 64) * 64 for a in flat)])
        record = np.zeros(starts[-1], np.uint8)
        for start, array in zip(starts, flat, strict=False):
            record[start : start + array.size] = array
        records.append(record)
    places = iter(starts.tolist())
    offsets = [([next(places) for _ in p.arrays] + [0])[:3] for p in experts[0]]
    routed = Swiglu(*(type(p.matrix)(p.matrix.format, p.matrix.rows, p.matrix.columns, tuple(o))
                      for p, o in zip(experts[0], offsets, strict=True)))  # fmt: skip
    x = normal(tokens, hidden)
    chosen = [(0, [0]), (2, [0])] if tokens == 1 else [(0, [0, 1, 2, 3, 5]), (1, [4]), (2, list(range(6)))]
    weights = [normal(len(rows)) for _, rows in chosen]
    gate = normal(tokens)
    expected = 1 + gate[:, None] * swiglu_of(shared, x.astype(np.float64))
    for (e, rows), w in zip(chosen, weights, strict=True):
        expected[rows] += w[:, None] * swiglu_of(experts[e], x[rows].astype(np.float64))
    found = []
    for pool in pools:
        layer = Experts(routed, Swiglu(*(p.matrix for p in shared)), pool)
        parts = [Rows(None, np.arange(tokens), gate)]
        parts += [Rows(records[e].ctypes.data, np.array(rows), w) for (e, rows), w in zip(chosen, weights, strict=True)]
        together, one_by_one = np.ones_like(x), np.ones_like(x)
        layer.add(layer.arrange(x), parts, together)
        for part in parts:
            layer.add(layer.arrange(x), [part], one_by_one)
        assert np.array_equal(together.view(np.uint32), one_by_one.view(np.uint32))  # however they arrive
        found.append(together)
        assert error(together, expected) < 1e-6
    assert np.array_equal(found[0].view(np.uint32), found[1].view(np.uint32))


def delta_reference(
    proj: np.ndarray,
    weight: np.ndarray,
    conv: np.ndarray,
    state: np.ndarray,
    constants: tuple[np.ndarray, ...],
    heads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    log_decay, dt_bias, norm = constants
    hv, dv, dk = state.shape
    key_dim, value_dim, taps = heads * dk, hv * dv, len(weight)
    channels = 2 * key_dim + value_dim
    inputs, out = np.concatenate([conv, proj[:, :channels]]), []
    for t in range(len(proj)):
        mixed = (inputs[t : t + taps] * weight).sum(axis=0)
        mixed = mixed * sigmoid(mixed)
        q, k = (mixed[i * key_dim : (i + 1) * key_dim].reshape(heads, dk) for i in (0, 1))
        q, k = (a / np.sqrt((a * a).sum(axis=1, keepdims=True) + 1e-6) for a in (q, k))
        q, k = (np.repeat(a, hv // heads, axis=0) for a in (q * dk**-0.5, k))
        v = mixed[2 * key_dim :].reshape(hv, dv)
        z = proj[t, channels : channels + value_dim].reshape(hv, dv)
        b, a = proj[t, channels + value_dim :].reshape(2, hv)
        decay = np.exp(np.logaddexp(a + dt_bias, 0) * log_decay)[:, None, None]
        state = state * decay
        write = (v - np.einsum("hvk,hk->hv", state, k)) * sigmoid(b)[:, None]
        state = state + write[:, :, None] * k[:, None]
        y = np.einsum("hvk,hk->hv", state, q)
        y = y / np.sqrt((y * y).mean(axis=1, keepdims=True) + 1e-5) * norm
        out.append((y * z * sigmoid(z)).reshape(-1))
    return np.array(out), inputs[len(proj) :], state


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_gated_delta(pools: list[Workers], tokens: int) -> None:
    heads, hv, dk, dv, taps = 2, 6, 24, 20, 4
    channels = 2 * heads * dk + hv * dv
    weight, log_decay, dt_bias, norm = normal(taps, channels), -np.abs(normal(hv)), normal(hv), normal(dv)
    proj, conv, state = normal(tokens, channels + hv * dv + 2 * hv), normal(taps - 1, channels), normal(hv, dv, dk)
    expected = delta_reference(
        *(a.astype(np.float64) for a in (proj, weight, conv, state)), (log_decay, dt_bias, norm), heads
    )
    for pool in pools:
        layer = GatedDelta(
            weight, log_decay, dt_bias, norm, key_heads=heads, key_dim=dk, l2_eps=1e-6, eps=1e-5, workers=pool
        )
        own = conv.copy(), state.copy()
        out = np.empty((tokens, hv * dv), np.float32)
        layer(proj.copy(), out, [(0, tokens, *own)])
        for found, right in zip((out, *own), expected, strict=True):
            assert error(found, right) < 2e-6


@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 37), (5, 3), (40, 0), (17, 60)])
@pytest.mark.parametrize("dim", [32, 144])
def test_attention(pools: list[Workers], tokens: int, before: int, dim: int) -> None:
    heads, kv_heads, rotary, seen = 4, 2, 8, tokens + before
    proj = normal(tokens, 2 * heads * dim + 2 * kv_heads * dim)
    q_norm, k_norm = normal(dim), normal(dim)
    keys, values = normal(kv_heads, seen + 3, dim), normal(kv_heads, seen + 3, dim)
    keys[:, seen:] = values[:, seen:] = np.nan  # what is not there yet
    angles = normal(tokens, rotary // 2)
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def turned(x: np.ndarray, norm: np.ndarray) -> np.ndarray:  # [T, heads, D]
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * norm
        a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        cos, sin = turns[:, None, 0], turns[:, None, 1]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary:]], axis=-1)

    exact = proj.astype(np.float64)
    q, gate = np.split(exact[:, : 2 * heads * dim].reshape(tokens, heads, 2 * dim), 2, axis=2)
    k, v = np.split(exact[:, 2 * heads * dim :].reshape(tokens, 2 * kv_heads, dim), 2, axis=1)
    q, k = turned(q, q_norm), turned(k, k_norm)
    all_keys = np.concatenate([keys[:, :before], k.swapaxes(0, 1)], axis=1)
    all_values = np.concatenate([values[:, :before], v.swapaxes(0, 1)], axis=1)
    expected = np.empty((tokens, heads, dim))
    for t in range(tokens):
        for h in range(heads):
            visible = slice(0, before + t + 1)
            scores = all_keys[h // 2, visible] @ q[t, h] * dim**-0.5
            p = np.exp(scores - scores.max())
            expected[t, h] = p / p.sum() @ all_values[h // 2, visible] * sigmoid(gate[t, h])
    found = []
    for pool in pools:
        layer = Attention(q_norm, k_norm, heads=heads, kv_heads=kv_heads, rotary=rotary, eps=1e-6, workers=pool)
        cache, out = (keys.copy(), values.copy()), np.empty((tokens, heads * dim), np.float32)
        layer(proj.copy(), turns, out, [(0, tokens, *cache, before)])
        assert error(out, expected.reshape(tokens, -1)) < 2e-6
        assert error(cache[0][:, :seen], all_keys) < 2e-6
        assert np.array_equal(cache[1][:, :seen], all_values.astype(np.float32))
        assert np.isnan(cache[0][:, seen:]).all()
        found.append(out)
    assert np.array_equal(found[0].view(np.uint32), found[1].view(np.uint32))


COUNTS = (1, 20, 1, 3)


def test_gated_delta_of_several_sequences_is_that_of_each(pools: list[Workers]) -> None:
    heads, hv, dk, dv, taps = 2, 6, 24, 20, 4
    channels = 2 * heads * dk + hv * dv
    proj = normal(sum(COUNTS), channels + hv * dv + 2 * hv)
    states = [(normal(taps - 1, channels), normal(hv, dv, dk)) for _ in COUNTS]
    constants = normal(taps, channels), -np.abs(normal(hv)), normal(hv), normal(dv)
    for pool in pools:
        layer = GatedDelta(*constants, key_heads=heads, key_dim=dk, l2_eps=1e-6, eps=1e-5, workers=pool)
        alone, together = ([(conv.copy(), state.copy()) for conv, state in states] for _ in range(2))
        ends = np.cumsum(COUNTS).tolist()
        expected, found = (np.empty((sum(COUNTS), hv * dv), np.float32) for _ in range(2))
        for count, end, own in zip(COUNTS, ends, alone, strict=True):
            layer(proj[end - count : end].copy(), expected[end - count : end], [(0, count, *own)])
        layer(proj.copy(), found, [(e - c, e, *own) for c, e, own in zip(COUNTS, ends, together, strict=True)])
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
        for (a, b), (c, d) in zip(alone, together, strict=True):
            assert np.array_equal(a.view(np.uint32), c.view(np.uint32))
            assert np.array_equal(b.view(np.uint32), d.view(np.uint32))


def test_attention_of_several_sequences_is_that_of_each(pools: list[Workers]) -> None:
    heads, kv_heads, dim, before = 4, 2, 32, (5, 0, 40, 7)
    tokens = sum(COUNTS)
    proj, turns = normal(tokens, 2 * heads * dim + 2 * kv_heads * dim), normal(tokens, 2, 4)
    caches = [
        (normal(kv_heads, b + c + 2, dim), normal(kv_heads, b + c + 2, dim))
        for b, c in zip(before, COUNTS, strict=True)
    ]
    for pool in pools:
        layer = Attention(normal(dim), normal(dim), heads=heads, kv_heads=kv_heads, rotary=8, eps=1e-6, workers=pool)
        alone, together = ([(keys.copy(), values.copy()) for keys, values in caches] for _ in range(2))
        ends = np.cumsum(COUNTS).tolist()
        expected, found = (np.empty((tokens, heads * dim), np.float32) for _ in range(2))
        for count, end, own, b in zip(COUNTS, ends, alone, before, strict=True):
            part = slice(end - count, end)
            layer(proj[part].copy(), turns[part], expected[part], [(0, count, *own, b)])
        parts = [(e - c, e, *own, b) for c, e, own, b in zip(COUNTS, ends, together, before, strict=True)]
        layer(proj.copy(), turns, found, parts)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
        for (a, b), (c, d) in zip(alone, together, strict=True):
            assert np.array_equal(a.view(np.uint32), c.view(np.uint32))
            assert np.array_equal(b.view(np.uint32), d.view(np.uint32))


def test_rms_norm() -> None:
    x, weight = normal(3, 100), normal(100)
    out = np.empty_like(x)
    rms_norm(x, weight, np.float32(1e-5), out)
    exact = x.astype(np.float64)
    assert error(out, exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * weight) < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_router(normalize: bool) -> None:
    logits = normal(4, 20, scale=3.0)
    ids, weights = np.empty((4, 3), np.int64), np.empty((4, 3), np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    route(logits, normalize, ids, weights)
    assert np.array_equal(ids, np.argsort(-p, axis=1)[:, :3])
    expected = np.take_along_axis(p, ids, axis=1)
    assert error(weights, expected / expected.sum(axis=1, keepdims=True) if normalize else expected) < 1e-6


@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_nan_among_logits_shows(place: int) -> None:
    logits = normal(2, 20)
    logits[1, place] = np.nan
    ids, weights = np.empty((2, 3), np.int64), np.empty((2, 3), np.float32)
    route(logits, True, ids, weights)
    assert not np.isnan(weights[0]).any()
    assert np.isnan(weights[1]).all()


def test_exp() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    found = np.array([exp(v) for v in x[::50]])
    assert np.abs(found / np.exp(x[::50].astype(np.float64)) - 1).max() < 3e-7
    assert exp(np.float32(-np.inf)) < 1e-37
    assert np.isnan(exp(np.float32(np.nan)))


@pytest.mark.parametrize("place", [0, 30, -1, -7])
def test_a_nan_in_gated_delta_shows(pools: list[Workers], place: int) -> None:
    heads, hv, dk, dv = 2, 4, 16, 16
    channels = 2 * heads * dk + hv * dv
    layer = GatedDelta(
        normal(4, channels), -np.abs(normal(hv)), normal(hv), normal(dv), key_heads=heads, key_dim=dk, l2_eps=1e-6, eps=1e-5,
        workers=pools[0],
    )  # fmt: skip
    proj = normal(2, channels + hv * dv + 2 * hv)
    proj[1, place] = np.nan
    out = np.empty((2, hv * dv), np.float32)
    layer(proj, out, [(0, 2, normal(3, channels), normal(hv, dv, dk))])
    assert not np.isnan(out[0]).any()
    assert np.isnan(out[1]).any()


@pytest.mark.parametrize("place", [3, 40, -40, -1])
def test_a_nan_in_attention_shows(pools: list[Workers], place: int) -> None:
    layer = Attention(normal(32), normal(32), heads=2, kv_heads=1, rotary=8, eps=1e-6, workers=pools[0])
    proj = normal(2, 6 * 32)
    proj[1, place] = np.nan
    out = np.empty((2, 64), np.float32)
    layer(proj, normal(2, 2, 4), out, [(0, 2, normal(1, 8, 32), normal(1, 8, 32), 3)])
    assert np.isnan(out[1]).any()
