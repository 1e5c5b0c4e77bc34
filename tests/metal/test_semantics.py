"""The emulated operations mean what the Metal specification says, against NumPy."""

import functools

import emulator
import mlx.core as mx
import numpy as np
import pytest

X = np.random.default_rng(0).normal(size=64).astype(np.float32)
LANES = X.reshape(2, 32)
LANE = np.arange(64) % 32
INTS = np.arange(64, dtype=np.uint32) * np.uint32(0x9E3779B9)
BITS = np.array([[(n >> b) & 1 for b in range(32)] for n in INTS.tolist()])

# float expressions of v = X[i], n = INTS[i], lane and i, and what all 64 threads should get
OPERATIONS = {
    "simd_sum(v)": np.repeat(LANES.sum(1), 32),
    "simd_product(v)": np.repeat(LANES.prod(1), 32),
    "simd_max(v)": np.repeat(LANES.max(1), 32),
    "simd_min(v)": np.repeat(LANES.min(1), 32),
    "simd_sum(float2(v, 1.0f)).y": np.full(64, 32),
    "float(simd_or(n) >> 8)": np.repeat(np.bitwise_or.reduce(INTS.reshape(2, 32), 1) >> 8, 32),
    "float(simd_and(n | 5u))": np.repeat(np.bitwise_and.reduce(INTS.reshape(2, 32) | 5, 1), 32),
    "float(simd_xor(n) >> 8)": np.repeat(np.bitwise_xor.reduce(INTS.reshape(2, 32), 1) >> 8, 32),
    "float(simd_all(lane < 32) + 2 * simd_any(lane == 40) + 4 * simd_any(lane == 31))": np.full(64, 5),
    "float(ulong(simd_ballot(lane % 8 == 0)))": np.full(64, 0x01010101),
    "float(simd_is_first())": LANE == 0,
    "simd_shuffle(v, ushort(31 - lane))": LANES[:, ::-1],
    "simd_shuffle_xor(v, ushort(5))": LANES[:, np.arange(32) ^ 5],
    "simd_broadcast(v, ushort(7))": np.repeat(LANES[:, 7], 32),
    "simd_broadcast_first(v)": np.repeat(LANES[:, 0], 32),
    "simd_shuffle_down(v, ushort(4))": np.concatenate([LANES[:, 4:], LANES[:, 28:]], 1),
    "simd_shuffle_up(v, ushort(4))": np.concatenate([LANES[:, :4], LANES[:, :28]], 1),
    "simd_shuffle_rotate_down(v, ushort(3))": np.roll(LANES, -3, 1),
    "simd_shuffle_rotate_up(v, ushort(3))": np.roll(LANES, 3, 1),
    "simd_shuffle_and_fill_down(v, 9.0f, ushort(2))": np.concatenate([LANES[:, 2:], np.full((2, 2), 9)], 1),
    "simd_shuffle_and_fill_up(v, 9.0f, ushort(2))": np.concatenate([np.full((2, 2), 9), LANES[:, :30]], 1),
    "simd_prefix_inclusive_sum(v)": np.cumsum(LANES, 1),
    "simd_prefix_exclusive_sum(v)": np.cumsum(LANES, 1) - LANES,
    "simd_prefix_inclusive_product(v)": np.cumprod(LANES, 1),
    "quad_sum(v)": np.repeat(X.reshape(16, 4).sum(1), 4),
    "quad_broadcast(v, ushort(2))": np.repeat(X[2::4], 4),
    "float(simd_sum(bfloat16_t(1.0f)))": np.full(64, 32),
    "v * 0.1": X * np.float32(0.1),  # a literal is single precision
    "metal::exp(v)": np.exp(X),
    "metal::precise::exp(v)": np.exp(X),
    "metal::fast::exp2(v)": np.exp2(X),
    "float(metal::exp(half(v)))": np.exp(X.astype(np.float16).astype(np.float32)).astype(np.float16),
    "rsqrt(v * v + 1.0f)": 1 / np.sqrt(X * X + 1),
    "tanh(v) + log(abs(v)) + rint(4.0f * v)": np.tanh(X) + np.log(np.abs(X)) + np.rint(4 * X),
    "clamp(v, -0.5f, 0.5f)": np.clip(X, -0.5, 0.5),
    "max(float4(v), float4(0.0f)).w": np.maximum(X, 0),
    "sign(v) * fract(abs(v))": np.sign(X) * (np.abs(X) % 1),
    "select(v, 0.0f, v < 0.0f)": np.maximum(X, 0),
    "sinpi(v)": np.sin(np.pi * X.astype(np.float64)),
    "float(popcount(n))": BITS.sum(1),
    "float(clz(n | 1u))": BITS[:, ::-1].argmax(1) * (INTS > 1) + 31 * (INTS <= 1),
    "float(ctz(n | 0x80000000u))": np.where(BITS.any(1), BITS.argmax(1), 31),
    "float(extract_bits(n, 4, 8))": (INTS >> 4) & 255,
    "float(mulhi(n, 16u))": INTS >> 28,
    "float(rotate(n, 8u) & 0xFFu)": INTS >> 24,
    "float(as_type<uint>(v) >> 16)": X.view(np.uint32) >> 16,
    "float(as_type<half2>(as_type<uint>(v)).x)": X.view(np.float16)[::2],
    "float(as_type<ushort2>(n).y)": INTS >> 16,
    "float(uchar(n)) + float(char4(as_type<uchar4>(n)).w)": (INTS & 255) + INTS.view(np.int8)[3::4],
    "float(half(v) * half(3.0f))": X.astype(np.float16) * np.float16(3),
    "float(half(v) + half(1.0f) - half(1.0f))": X.astype(np.float16) + np.float16(1) - np.float16(1),
    "dot(float4(v, 1, 2, v), float4(2, v, 1, 1))": 4 * X + 2,
    "float4(1, float2(v, 3), 4).zyxw.y": X,
    "float2(v, 1).yx.x + float3(1, 2, 3).z": np.full(64, 4),
    "float(int4(float4(v * 8.0f)).y)": np.trunc(X * 8),
    "float4(*(const device float4*)(x + i / 4 * 4)).w": np.repeat(X[3::4], 4),
    "float(bfloat16_t(v) * bfloat16_t(3.0f))": np.array((mx.array(X).astype(mx.bfloat16) * 3).astype(mx.float32)),
    "alias4(uint4(n % 7u)).x": INTS % 7,  # a constructor through an alias converts values as well
    "length(float2(3.0f, 4.0f)) + cross(float3(1, 0, 0), float3(0, 1, 0)).z": np.full(64, 6),
    "float(sizeof(float3) + sizeof(packed_float3) + sizeof(half4))": np.full(64, 36),
    "float(all(float2(v) == float2(v))) + float(any(uint2(0u) != uint2(0u)))": np.ones(64),
    "float(isnan(NAN) && isinf(INFINITY) && !isfinite(-INFINITY))": np.ones(64),
    "float(FLT_MAX == numeric_limits<float>::max())": np.ones(64),
}  # fmt: skip


@functools.cache
def all_operations() -> np.ndarray:
    """One kernel computes every operation."""
    lines = "\n".join(f"out[{k} * 64 + i] = {text};" for k, text in enumerate(OPERATIONS))
    begin = """const uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
    const float v = x[i]; const uint n = ints[i];
    """
    kernel = emulator.metal_kernel(
        "operations", ["x", "ints"], ["out"], begin + lines, "using alias4 = vec<float, 4>;\n", mode="check"
    )
    (out,) = kernel(
        inputs=[mx.array(X), mx.array(INTS)],
        output_shapes=[(len(OPERATIONS), 64)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    return np.array(out)


@pytest.mark.parametrize("text", OPERATIONS)
def test_operation(text):
    expected = np.asarray(OPERATIONS[text], np.float32).ravel()
    np.testing.assert_allclose(all_operations()[list(OPERATIONS).index(text)], expected, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bf16", "f16"])
def test_conversion_rounds_to_nearest_even(dtype):
    """Ties, subnormals, infinities and NaN, as MLX converts them."""
    values = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 3e38, 65520, 1e-7, -0.0, np.inf, np.nan, *X], np.float32
    )
    kernel = emulator.metal_kernel("convert", ["x"], ["out"], "uint i = thread_position_in_grid.x; out[i] = T(x[i]);")
    (out,) = kernel(
        inputs=[mx.array(values)],
        template=[("T", dtype)],
        output_shapes=[values.shape],
        output_dtypes=[dtype],
        grid=(values.size, 1, 1),
        threadgroup=(32, 1, 1),
    )
    np.testing.assert_array_equal(
        np.array(out.astype(mx.float32)), np.array(mx.array(values).astype(dtype).astype(mx.float32))
    )


@pytest.mark.parametrize("mode, fused", [("fast", True), ("nocontract", False)])
def test_contraction(mode, fused):
    a = np.float32(1 + 2**-12)
    kernel = emulator.metal_kernel("contract", ["x"], ["out"], "out[0] = x[0] * x[0] - x[1];", mode=mode)
    (out,) = kernel(
        inputs=[mx.array(np.array([a, a * a]))],
        output_shapes=[(1,)],
        output_dtypes=[mx.float32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    assert out.item() == (2**-24 if fused else 0)


def test_simdgroup_matrix():
    a, b = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)
    source = """simdgroup_float8x8 A, B, C = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    simdgroup_load(A, a, 8); simdgroup_load(B, b, 8, 0, true);
    simdgroup_multiply_accumulate(C, A, B, C);
    simdgroup_store(C, out, 8);"""
    kernel = emulator.metal_kernel(
        "matrix", ["a", "b"], ["out"], source, "#include <metal_simdgroup_matrix>\n", mode="check"
    )
    (out,) = kernel(
        inputs=[mx.array(a), mx.array(b)],
        output_shapes=[(8, 8)],
        output_dtypes=[mx.float32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    np.testing.assert_allclose(np.array(out), a @ b.T, rtol=1e-5, atol=1e-5)
