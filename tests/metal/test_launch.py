"""Buffers, grids, threads and memory: what a launch gives to a kernel and takes from it."""

import emulator
import mlx.core as mx
import numpy as np
import pytest

X = np.random.default_rng(0).normal(size=64).astype(np.float32)


def launch(
    source, inputs, shape, dtype=mx.float32, grid=(64, 1, 1), threadgroup=(64, 1, 1), header="", call=None, **options
):
    """A kernel with one output; `inputs` maps names to arrays."""
    options = {"mode": "check", **options}
    kernel = emulator.metal_kernel("kernel", list(inputs), ["out"], source, header, **options)
    (out,) = kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=threadgroup,
        **(call or {}),
    )
    return np.array(out)


INDEX = "const uint i = thread_position_in_grid.x; "


def test_small_inputs_are_constant():
    """MLX passes arrays of fewer than 8 elements as `constant`, which a helper for `device` does not take."""
    any_space = "template <typename P> METAL_FUNC float first(P p) { return p[0]; }\n"
    device = "METAL_FUNC float first(const device float* p) { return p[0]; }\n"
    source = INDEX + "out[i] = first(x);"
    assert (launch(source, {"x": mx.array(X[:7])}, (64,), header=any_space) == X[0]).all()
    assert (launch(source, {"x": mx.array(X[:8])}, (64,), header=device) == X[0]).all()
    with pytest.raises(emulator.MetalError, match=r"kernel\.metal:1.*no matching function"):
        launch(source, {"x": mx.array(X[:7])}, (64,), header=device)


def test_shapes_strides_and_scalars():
    source = INDEX + "out[i] = x[i] * s + float(x_shape[1]) + 100 * float(x_strides[0]) + 10000 * float(x_ndim);"
    out = launch(source, {"x": mx.array(X.reshape(2, 32)), "s": 2.0}, (64,))
    np.testing.assert_allclose(out, X * 2 + 32 + 3200 + 20000, rtol=1e-6)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_strided_input(contiguous, dtype):
    x = mx.array(np.arange(24, dtype=np.float32).reshape(4, 6)).astype(dtype).T[1:5]
    source = INDEX + "out[i] = float(x[i / 4 * x_strides[0] + i % 4 * x_strides[1]]) + 100 * float(x_strides[1]);"
    kernel = emulator.metal_kernel("kernel", ["x"], ["out"], source, ensure_row_contiguous=contiguous, mode="check")
    (out,) = kernel(
        inputs=[x], output_shapes=[(4, 4)], output_dtypes=[mx.float32], grid=(16, 1, 1), threadgroup=(16, 1, 1)
    )
    stride = 1 if contiguous else 6
    np.testing.assert_array_equal(np.array(out) - 100 * stride, np.array(x.astype(mx.float32)))


def test_templates_and_several_outputs():
    source = INDEX + "a[i] = T(i * N); if (FLAG) b[i] = int(sizeof(T)) + N;"
    kernel = emulator.metal_kernel("kernel", ["x"], ["a", "b"], source, mode="check")
    for dtype, size in ((mx.bfloat16, 2), (mx.uint8, 1), (mx.int64, 8)):
        a, b = kernel(
            inputs=[mx.array(X)],
            template=[("T", dtype), ("N", 3), ("FLAG", True)],
            output_shapes=[(4,), (2, 2)],
            output_dtypes=[dtype, mx.int32],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
        )
        assert (a.dtype, a.tolist()) == (dtype, [0, 3, 6, 9])
        assert b.tolist() == [[3 + size] * 2] * 2


def test_outputs_start_as_nan_or_init_value():
    source = INDEX + "if (i % 2) out[i] = 1.0f;"
    out = launch(source, {"x": mx.array(X)}, (64,))
    assert np.isnan(out[::2]).all()
    assert (out[1::2] == 1).all()
    out = launch(source, {"x": mx.array(X)}, (64,), call={"init_value": 7})
    assert (out[::2] == 7).all()


def test_ragged_grid():
    """The grid counts threads: threadgroups at its edge are smaller."""
    source = """uint3 p = thread_position_in_grid, g = threadgroup_position_in_grid, t = thread_position_in_threadgroup;
    uint3 size = threads_per_threadgroup, full = dispatch_threads_per_threadgroup;
    uint at = (p.z * 5 + p.y) * 7 + p.x;
    bool right = all(p == g * full + t) && all(threads_per_grid == uint3(7, 5, 3));
    right = right && thread_index_in_threadgroup == (t.z * size.y + t.y) * size.x + t.x;
    right = right && all(threadgroups_per_grid == uint3(2, 3, 2)) && x[0] == x[0];
    out[at] = right ? float(size.x * 100 + size.y * 10 + size.z) : -1.0f;"""
    out = launch(source, {"x": mx.array(X)}, (3, 5, 7), grid=(7, 5, 3), threadgroup=(4, 2, 2))
    x, y, z = np.where(np.arange(7) < 4, 4, 3), np.where(np.arange(5) < 4, 2, 1), np.where(np.arange(3) < 2, 2, 1)
    np.testing.assert_array_equal(out, x * 100 + y[:, None] * 10 + z[:, None, None])


def test_threadgroup_larger_than_the_grid_shrinks():
    out = launch(
        "out[thread_position_in_grid.x] = x[0] * 0 + threads_per_threadgroup.x;",
        {"x": mx.array(X)},
        (40,),
        grid=(40, 1, 1),
    )
    assert (out == 40).all()


def test_simdgroup_at_the_edge():
    """The last simdgroup has the lanes that are left."""
    source = INDEX + "out[i] = simd_sum(x[i] * 0 + 1.0f) + 100 * simdgroups_per_threadgroup;"
    out = launch(source, {"x": mx.array(X)}, (40,), grid=(40, 1, 1), threadgroup=(40, 1, 1))
    np.testing.assert_array_equal(out, np.where(np.arange(40) < 32, 232, 208))


def test_threadgroup_memory_and_barriers():
    """A tree reduction, with as many barriers as levels."""
    source = """threadgroup float tree[256];
    const uint i = thread_index_in_threadgroup;
    tree[i] = x[thread_position_in_grid.x];
    for (uint d = 128; d > 0; d /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (i < d) tree[i] += tree[i + d];
    }
    if (i == 0) out[threadgroup_position_in_grid.x] = tree[0];"""
    values = np.arange(1024, dtype=np.float32)
    for order in ("forward", "reverse", "random"):
        out = launch(source, {"x": mx.array(values)}, (4,), grid=(1024, 1, 1), threadgroup=(256, 1, 1), order=order)
        np.testing.assert_array_equal(out, values.reshape(4, 256).sum(1))


def test_device_memory_between_threads():
    """`mem_device` orders what the threads of one threadgroup write to an output and read again."""
    source = (
        INDEX
        + "out[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float v = out[63 - i]; "
        + ("threadgroup_barrier(mem_flags::mem_device); out[i] = v;")
    )
    np.testing.assert_array_equal(launch(source, {"x": mx.array(X)}, (64,)), X[::-1])
    with pytest.raises(emulator.MetalError, match=r"race: .* without a barrier for device memory"):
        launch(source.replace("mem_device", "mem_threadgroup", 1), {"x": mx.array(X)}, (64,))


def test_structs():
    """In threadgroup memory and, member by member, in device memory."""
    header = "struct Best { float value; uint index; };\n"
    source = """#define PAIRS 2
    alignas(16) threadgroup float4 unused[PAIRS];
    threadgroup Best best[64];
    const uint i = thread_position_in_grid.x;
    if (i == 0) unused[0] = float4(0.0f);
    best[i].value = x[i]; best[i].index = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const device Best* pairs = (const device Best*)x;
    out[i] = best[63 - i].value + float(best[63 - i].index) + pairs[i / 2].value;"""
    out = launch(source, {"x": mx.array(X)}, (64,), header=header)
    np.testing.assert_allclose(out, X[::-1] + np.arange(63, -1, -1) + np.repeat(X[::2], 2), rtol=1e-6)


def test_atomics():
    source = """threadgroup atomic_uint count;
    if (thread_index_in_threadgroup == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint ticket = atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
    atomic_fetch_add_explicit(&out[ticket], uint(x[thread_position_in_grid.x]), memory_order_relaxed);
    const memory_order relaxed = memory_order_relaxed;
    uint old = 0;
    while (!atomic_compare_exchange_weak_explicit(&out[64], &old, old + 1, relaxed, relaxed)) {}
    atomic_fetch_max_explicit(&out[65], thread_position_in_grid.x, memory_order_relaxed);"""
    call = {"init_value": 0}
    options = {"atomic_outputs": True, "grid": (256, 1, 1), "call": call}
    out = launch(source, {"x": mx.ones(256)}, (66,), mx.uint32, **options)
    assert out.tolist() == [4] * 64 + [256, 255]
    with pytest.raises(emulator.MetalError, match=r"uninit: .* reads threadgroup memory"):
        launch(source.replace("== 0)", "== 99)"), {"x": mx.ones(256)}, (66,), mx.uint32, **options)


def test_order():
    """The order decides who gets which ticket, and a seed gives the same order again."""
    source = (
        INDEX
        + "out[i + 1] = atomic_fetch_add_explicit((device atomic_uint*)out, 1u, memory_order_relaxed) + uint(x[0] * 0);"
    )

    def tickets(**options):
        options = {"grid": (16, 1, 1), "threadgroup": (4, 1, 1), "call": {"init_value": 0}, **options}
        return launch(source, {"x": mx.array(X)}, (17,), mx.uint32, **options)[1:].tolist()

    assert tickets(order="forward") == list(range(16))
    assert tickets(order="reverse") == list(range(15, -1, -1))
    random = tickets(order="random", seed=3)
    assert sorted(random) == list(range(16)) != random
    assert random == tickets(order="random", seed=3) != tickets(order="random", seed=4)
