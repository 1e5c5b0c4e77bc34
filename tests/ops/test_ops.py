"""Every op against its float64 oracle, at awkward sizes, on each of its paths."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracles
import pytest

from flash_moe.formats import Quantization
from flash_moe.ops import delta_chunks
from flash_moe.ops import gated_delta as gated_delta_module
from flash_moe.ops.attention import attention
from flash_moe.ops.blas import MIN_ROWS, matmul
from flash_moe.ops.causal_conv import causal_conv
from flash_moe.ops.delta_chunks import gated_delta_chunks
from flash_moe.ops.gated_delta import gated_delta, gated_delta_reference
from flash_moe.ops.linear import linear
from flash_moe.ops.norm import l2_norm, rms_norm
from flash_moe.ops.router import route

TOKENS = [1, 2, MIN_ROWS - 1, MIN_ROWS, 63, 65]


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(7)


def close(actual: mx.array, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(np.array(actual, dtype=np.float64), expected, rtol=tolerance, atol=tolerance)


def f32(array: np.ndarray) -> mx.array:
    return mx.array(array.astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 7), (1, 1, 4096)], ids=str)
def test_norms(shape: tuple[int, ...], rng: np.random.RandomState) -> None:
    x, w = rng.randn(*shape), rng.randn(shape[-1])
    close(rms_norm(f32(x), f32(w), 1e-6), oracles.rms_norm(x, w, 1e-6))
    close(rms_norm(f32(x), None, 1e-6), oracles.rms_norm(x, 1.0, 1e-6))
    close(l2_norm(f32(x), 1e-6), x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6))


def test_norms_in_bfloat16_use_mlx(rng: np.random.RandomState) -> None:
    x = mx.array(rng.randn(3, 64)).astype(mx.bfloat16)
    exact = np.array(x.astype(mx.float32), dtype=np.float64)
    for y, expected in (
        (rms_norm(x, None, 1e-6), oracles.rms_norm(exact, 1.0, 1e-6)),
        (l2_norm(x, 1e-6), exact / np.sqrt((exact**2).sum(axis=-1, keepdims=True) + 1e-6)),
    ):
        assert y.dtype == mx.bfloat16
        close(y.astype(mx.float32), expected, 0.02)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("taps", [2, 4])
def test_causal_conv(tokens: int, taps: int, rng: np.random.RandomState) -> None:
    x, w, state = rng.randn(tokens, 11), rng.randn(taps, 11), rng.randn(taps - 1, 11)
    y, new_state = causal_conv(f32(x), f32(w), f32(state))
    close(y, oracles.causal_conv(x, w, state))
    close(new_state, np.concatenate([state, x])[-(taps - 1) :])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("past", [0, 5, 300])
def test_attention(tokens: int, heads: tuple[int, int], past: int, rng: np.random.RandomState) -> None:
    q = rng.randn(heads[0], tokens, 16)
    k, v = rng.randn(heads[1], past + tokens, 16), rng.randn(heads[1], past + tokens, 16)
    close(attention(f32(q), f32(k), f32(v), 0.25), oracles.attention(q, k, v, 0.25))


@pytest.mark.parametrize(
    "path", [gated_delta, gated_delta_chunks, gated_delta_reference], ids=["chosen", "chunks", "reference"]
)
@pytest.mark.parametrize("tokens", [*TOKENS, 200])
@pytest.mark.parametrize("sizes", [(2, 4, 32, 32), (1, 3, 16, 8), (2, 2, 8, 24)], ids=str)
def test_gated_delta(path, tokens: int, sizes: tuple[int, int, int, int], rng: np.random.RandomState) -> None:
    key_heads, heads, dk, dv = sizes
    q, k = (rng.randn(tokens, key_heads, dk) for _ in "qk")
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = rng.randn(tokens, heads, dv), rng.randn(heads, dv, dk)
    decay, beta = rng.uniform(0.5, 1, (tokens, heads)), rng.uniform(0, 1, (tokens, heads))
    y, new_state = path(*map(f32, (q, k, v, decay, beta, state)))
    expected, expected_state = oracles.gated_delta(q, k, v, decay, beta, state)
    close(y, expected, 1e-4)
    close(new_state, expected_state, 1e-4)


@pytest.mark.parametrize("sizes", [(2, 4, 32, 32), (1, 3, 16, 8), (2, 2, 8, 24)], ids=str)
def test_steps_of_large_states(
    sizes: tuple[int, int, int, int], rng: np.random.RandomState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_delta_module, "_STEP_STATE", 0)
    key_heads, heads, dk, dv = sizes
    first = rng.randn(heads, dv, dk)
    expected_state, state = first, f32(first)
    seen = []
    for _ in range(3):
        q, k, v = rng.randn(1, key_heads, dk), rng.randn(1, key_heads, dk) / dk**0.5, rng.randn(1, heads, dv)
        decay, beta = rng.uniform(0.5, 1, (1, heads)), rng.uniform(0, 1, (1, heads))
        seen.append((state, expected_state))
        y, state = gated_delta(*map(f32, (q, k, v, decay, beta)), state)
        expected, expected_state = oracles.gated_delta(q, k, v, decay, beta, expected_state)
        close(y, expected)
    for found, exact in [*seen, (state, expected_state)]:
        close(found, exact)  # earlier states stay as they were


@pytest.mark.parametrize("path", [gated_delta, gated_delta_chunks], ids=["chosen", "chunks"])
@pytest.mark.parametrize("decay", [0.0, 1e-30, 1e-4, 1.0], ids=str)
def test_chunked_delta_rule_survives_extreme_decay_and_repeated_keys(
    path, decay: float, rng: np.random.RandomState
) -> None:
    """Equal keys with full writing strength make the triangular system as hard as it gets."""
    tokens = 3 * gated_delta_module.CHUNK + 5
    k = np.repeat(rng.randn(1, 1, 16), tokens, axis=0)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q, v, state = rng.randn(tokens, 1, 16), rng.randn(tokens, 2, 8), rng.randn(2, 8, 16)
    decays = np.where(rng.uniform(size=(tokens, 2)) < 0.5, decay, 0.999)
    beta = np.full((tokens, 2), 0.9999)
    y, new_state = path(*map(f32, (q, k, v, decays, beta, state)))
    expected, expected_state = oracles.gated_delta(q, k, v, decays, beta, state)
    close(y, expected, 1e-3)
    close(new_state, expected_state, 1e-3)


def test_chunks_are_run_in_parts_that_bound_memory(rng: np.random.RandomState, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = *(rng.randn(150, 1, 8) / 8 for _ in "qk"), rng.randn(150, 2, 8)
    operands = *arrays, *(rng.uniform(0.5, 1, (150, 2)) for _ in range(2)), rng.randn(2, 8, 8)
    expected = gated_delta_chunks(*map(f32, operands))
    monkeypatch.setattr(delta_chunks, "_TOGETHER", 1)
    for found, one_part in zip(gated_delta_chunks(*map(f32, operands)), expected, strict=True):
        close(found, np.array(one_part))
    narrow = [f32(a).astype(mx.bfloat16) for a in operands[:3]]
    y, state = gated_delta_chunks(*narrow, *map(f32, operands[3:]))
    assert (y.dtype, state.dtype) == (mx.bfloat16, mx.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_quantized_linear(bits: int, group_size: int, tokens: int, rng: np.random.RandomState) -> None:
    x, q = rng.randn(tokens, 256), Quantization(bits, group_size)
    w, scales, biases = mx.quantize(f32(rng.randn(48, 256)), group_size=group_size, bits=bits)
    dense = oracles.dequantize(*(np.array(a) for a in (w, scales, biases)), bits, group_size)
    close(linear(f32(x), w, scales, biases, q), x @ dense.T, 1e-4)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 9, 32])
def test_rows_of_a_single_group(tokens: int, group_size: int, rng: np.random.RandomState) -> None:
    """MLX 0.32.4 is wrong about these on Hopper."""
    x = rng.randn(tokens, group_size)
    w, scales, biases = mx.quantize(f32(rng.randn(256, group_size)), group_size=group_size, bits=4)
    dense = oracles.dequantize(*(np.array(a) for a in (w, scales, biases)), 4, group_size)
    close(linear(f32(x), w, scales, biases, Quantization(4, group_size)), x @ dense.T, 1e-4)


@pytest.mark.parametrize("group_size", [64, 128])
def test_on_cuda_rows_of_a_single_group_are_dequantised(
    group_size: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.RandomState
) -> None:
    monkeypatch.setattr("flash_moe.ops.kernel.back_end", lambda: "cuda")
    monkeypatch.setattr("flash_moe.ops.linear.use_blas", lambda rows, dtype: False)
    unwritten = mx.full((32, 256), float("nan"))
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **options: unwritten)
    test_rows_of_a_single_group(32, group_size, rng)


def test_on_cuda_wide_groups_are_multiplied_as_two_halves(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.RandomState
) -> None:
    monkeypatch.setattr("flash_moe.ops.kernel.back_end", lambda: "cuda")
    monkeypatch.setattr("flash_moe.ops.linear.use_blas", lambda rows, dtype: False)
    asked, multiply = [], mx.quantized_matmul

    def quantized_matmul(*args: mx.array, group_size: int, **options: Any) -> mx.array:
        asked.append(group_size)
        return multiply(*args, group_size=group_size, **options)

    monkeypatch.setattr(mx, "quantized_matmul", quantized_matmul)
    x = rng.randn(40, 256)
    w, scales, biases = mx.quantize(f32(rng.randn(48, 256)), group_size=128, bits=4)
    dense = oracles.dequantize(*(np.array(a) for a in (w, scales, biases)), 4, 128)
    close(linear(f32(x), w, scales, biases, Quantization(4, 128)), x @ dense.T, 1e-4)
    assert asked == [64]


@pytest.mark.parametrize("tokens", [1, 40])
def test_plain_linear_and_batched_matmul(tokens: int, rng: np.random.RandomState) -> None:
    x, w = rng.randn(tokens, 33), rng.randn(21, 33)
    close(linear(f32(x), f32(w)), x @ w.T, 1e-4)
    a, b = rng.randn(3, tokens, 9), rng.randn(3, 9, 5)
    close(matmul(f32(a), f32(b)), a @ b, 1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [1, 2, 13, 512])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(dtype: mx.Dtype, experts: int, normalize: bool, rng: np.random.RandomState) -> None:
    logits = mx.array(4 * rng.randn(5, experts)).astype(dtype)
    exact = np.array(logits.astype(mx.float32), dtype=np.float64)
    for k in {1, min(4, experts), experts}:
        ids, weights = route(logits, k, normalize)
        assert ids.shape == weights.shape == (5, k)
        assert weights.dtype == mx.float32
        probabilities = oracles.softmax(exact)
        order = np.argsort(-probabilities, axis=-1)[:, :k]
        chosen = np.array(ids)
        np.testing.assert_allclose(  # by probability: bf16 logits have ties
            np.sort(np.take_along_axis(probabilities, chosen, 1)), np.sort(np.take_along_axis(probabilities, order, 1))
        )
        expected = np.take_along_axis(probabilities, chosen, 1)
        close(weights, expected / expected.sum(axis=-1, keepdims=True) if normalize else expected, 1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_route_passes_nan_on(dtype: mx.Dtype) -> None:
    _, weights = route(mx.array([[0.0, float("nan"), 1.0]]).astype(dtype), 2, True)
    assert np.isnan(np.array(weights)).any()
