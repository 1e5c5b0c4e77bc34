"""What GPUs without kernels run for one token, in few launches: the same numbers as the ops they stand in for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from oracles import causal_conv as conv_oracle
from oracles import gated_delta as delta_oracle

from flash_moe.ops import kernel
from flash_moe.ops.causal_conv import causal_conv
from flash_moe.ops.delta_net import delta_net
from flash_moe.ops.experts import add_weighted, experts_in_place
from flash_moe.ops.gated_delta import gated_delta_step
from flash_moe.ops.router import _mlx_route
from flash_moe.record import PROJECTIONS, ProjectionFormat, Quantization, RecordLayout

BF16 = 2.0**-8  # half of the distance of two numbers


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def narrow(array: np.ndarray) -> tuple[mx.array, np.ndarray]:
    """An array in bfloat16, and what it holds in float64."""
    found = mx.array(array.astype(np.float32)).astype(mx.bfloat16)
    return found, np.array(found.astype(mx.float32), dtype=np.float64)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_of_a_token_rounds_once(taps: int, rng: np.random.Generator) -> None:
    shapes = (1, 96), (taps, 96), (taps - 1, 96)
    (x, x64), (weight, weight64), (state, state64) = (narrow(rng.normal(size=shape)) for shape in shapes)
    y, new_state = causal_conv(x, weight, state)
    expected = conv_oracle(x64, weight64, state64)
    np.testing.assert_allclose(wide(y), expected, rtol=1.01 * BF16, atol=1e-6)
    np.testing.assert_array_equal(wide(new_state), np.concatenate([state64, x64])[1:])


@pytest.mark.parametrize("sizes", [(2, 2, 32, 32), (2, 6, 64, 32), (3, 3, 32, 128)], ids=str)
def test_a_step_of_the_delta_rule(sizes: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    key_heads, heads, dk, dv = sizes
    q, k = rng.normal(size=(2, 1, key_heads, dk)) * dk**-0.5
    v, state = rng.normal(size=(1, heads, dv)), rng.normal(size=(heads, dv, dk))
    decay, beta = rng.uniform(0.1, 1, (2, 1, heads))
    shape = key_heads, -1, 1, 1
    q32, k32, v32, decay32, beta32, state32 = (
        mx.array(a.astype(np.float32)) for a in (q, k, v, decay.reshape(shape), beta.reshape(shape), state)
    )
    y, new_state = gated_delta_step(q32, k32, v32, decay32, beta32, state32)
    expected, expected_state = delta_oracle(q, k, v, decay, beta, state)
    np.testing.assert_allclose(np.array(y), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(new_state), expected_state, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_delta_net_layer_on_cuda(dtype: mx.Dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    key_heads, heads, dk, dv, taps = 2, 4, 32, 32, 4
    channels = 2 * key_heads * dk + heads * dv

    def random(*shape: int, dtype: mx.Dtype = dtype) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)

    inputs = random(1, channels), random(1, heads * dv), random(1, heads), random(1, heads), random(taps - 1, channels)
    state, options = random(heads, dv, dk, dtype=mx.float32), {
        "conv_weight": random(taps, channels),
        "qk_scale": mx.array([dk**-0.5, 1.0], dtype=dtype)[:, None, None],
        "log_decay": -mx.exp(random(heads, dtype=mx.float32)),
        "dt_bias": random(heads, dtype=mx.float32),
        "norm_weight": random(dv),
        "l2_eps": 1e-6,
        "eps": 1e-6,
    }  # fmt: skip
    expected = delta_net(*inputs, state, **options)
    monkeypatch.setattr(kernel, "back_end", lambda: "cuda")
    found = delta_net(*inputs, state, **options)
    tolerance = 1e-5 if dtype == mx.float32 else 4 * BF16
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(wide(a), wide(b), atol=tolerance * np.abs(wide(b)).max())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 4, 32])
def test_routing_by_ops(k: int, normalize: bool, rng: np.random.Generator) -> None:
    logits, logits64 = narrow(np.stack([rng.permutation(32) / 4 - 3 for _ in range(3)]))
    ids, weights = _mlx_route(logits, k, normalize)
    p = np.exp(logits64) / np.exp(logits64).sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1)[:, :k]
    np.testing.assert_array_equal(np.sort(np.array(ids), axis=1), np.sort(order, axis=1))
    expected = np.take_along_axis(p, np.array(ids).astype(int), axis=1)
    if normalize:
        expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_by_ops_passes_nan_on(normalize: bool) -> None:
    logits = mx.zeros((2, 8), dtype=mx.bfloat16)
    logits[1, 3] = float("nan")
    ids, weights = _mlx_route(logits, 2, normalize)
    assert np.isnan(np.array(weights)).any(axis=1).tolist() == [False, True]
    assert int(ids.max()) < 8


@pytest.mark.parametrize("k", [1, 4, 6, 7, 10])
def test_outputs_of_experts_are_added_in_float32_and_rounded_once(k: int, rng: np.random.Generator) -> None:
    (rest, rest64), (y, y64) = narrow(rng.normal(size=(1, 64))), narrow(rng.normal(size=(k, 64)))
    weights = rng.random(k).astype(np.float32)
    found = add_weighted(rest, mx.array(weights), y)
    expected = rest64 + (weights[:, None] * y64).sum(axis=0)
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(wide(found), expected, rtol=1.01 * BF16, atol=1e-6)


def test_one_row_goes_to_all_experts(rng: np.random.Generator) -> None:
    layout = RecordLayout.build(64, 32, dict.fromkeys(PROJECTIONS, ProjectionFormat("F32", Quantization(4, 32))))
    parts = {}
    for _, projection in layout.projections:
        for part in projection.parts:
            shape = (5, *part.shape)
            words = mx.array(rng.integers(0, 1 << 32, shape, dtype=np.uint32))
            parts[part.key] = words if part.name == "weight" else mx.array(rng.normal(size=shape).astype(np.float32))
    x, rows = mx.array(rng.normal(size=(1, 64)).astype(np.float32)), mx.array([4, 0, 2], dtype=mx.uint32)
    one = experts_in_place(x, parts, rows, layout)
    each = experts_in_place(mx.broadcast_to(x, (3, 64)), parts, rows, layout)
    np.testing.assert_array_equal(np.array(one), np.array(each))
