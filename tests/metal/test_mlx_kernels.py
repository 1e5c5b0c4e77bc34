"""MLX's own Metal kernels, from its wheel, as canaries: they must compile, run clean and give the right numbers.

They are known to be right on Apple GPUs, so a failure here is a fault of the emulator.
"""

import re
from pathlib import Path

import emulator
import mlx.core as mx
import numpy as np
import pytest
from matvec import Case, float64

INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = "mlx/backend/metal/kernels/"
# MLX itself puts these in front of every kernel
PREAMBLE = {KERNELS + name for name in ("bf16.h", "bf16_math.h", "complex.h", "defines.h", "utils.h", "logging.h")}


def flatten(names: list[str]) -> str:
    """The headers `names` with all that they include, each once."""
    seen = set(PREAMBLE)

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (INCLUDE / name).read_text().replace("#pragma once", "")
        return re.sub(r'#include "([^"]*)"', lambda include: expand(include[1]), text)

    return "".join(expand(KERNELS + name) for name in names)


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bf16", "f16"])
def test_qmv_fast(dtype, mode):
    rows, columns = 64, 2048
    case = Case.random(rows, columns, dtype)
    kernel = emulator.metal_kernel(
        "mlx_qmv_fast",
        ["w", "scales", "biases", "x", "sizes"],
        ["out"],
        "qmv_fast_impl<T, 64, 4>(w, scales, biases, x, out, sizes[0], sizes[1], threadgroup_position_in_grid,"
        " simdgroup_index_in_threadgroup, thread_index_in_simdgroup);",
        flatten(["steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"]),
    )
    (out,) = kernel(
        inputs=[*case.inputs, mx.array([columns, rows], dtype=mx.int32)],
        template=[("T", dtype)],
        grid=(32, 2 * rows // 8, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(rows,)],
        output_dtypes=[dtype],
        mode=mode,
    )
    assert case.error(out, roundings=64) <= 1  # it scales x instead of the weights


SDPA = """sdpa_vector<T, 128, 128>(
  q, k, v, out, sizes[0], sizes[1], strides[0], strides[1], strides[0], strides[1], scale,
  (const device bool*)q, q, sizes[0], sizes[0], sizes[0], q, sizes[0],
  threadgroup_position_in_grid, threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""


def sdpa(header: str, **options) -> tuple[np.ndarray, np.ndarray]:
    """MLX's `sdpa_vector` on random data, and what it should give."""
    heads, kv_heads, length, size = 4, 2, 100, 128
    rng = np.random.default_rng(0)
    shapes = ((heads, size), (kv_heads, length, size), (kv_heads, length, size))
    q, k, v = (mx.array(rng.normal(size=shape).astype(np.float32)).astype(mx.bfloat16) for shape in shapes)
    kernel = emulator.metal_kernel("mlx_sdpa", ["q", "k", "v", "sizes", "strides", "scale"], ["out"], SDPA, header)
    sizes = mx.array([heads // kv_heads, length], dtype=mx.int32)
    strides = mx.array([length * size, size], dtype=mx.uint64)
    (out,) = kernel(
        inputs=[q, k, v, sizes, strides, mx.array(size**-0.5)],
        template=[("T", mx.bfloat16)],
        grid=(1024 * heads, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(heads, size)],
        output_dtypes=[mx.bfloat16],
        **options,
    )
    k64, v64 = (np.repeat(float64(x), heads // kv_heads, 0) for x in (k, v))
    scores = np.einsum("hd,hnd->hn", float64(q), k64) * size**-0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return float64(out), np.einsum("hn,hnd->hd", weights, v64)


@pytest.mark.parametrize("mode, order", [("fast", "forward"), ("fast", "random"), ("check", "reverse")])
def test_sdpa_vector(mode, order):
    out, expected = sdpa(flatten(["sdpa_vector.h"]), mode=mode, order=order)
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=2e-5)


def test_sdpa_vector_without_its_last_barrier():
    """Then a fast simdgroup can overwrite what a slow one still reads. The numbers are right here all the same."""
    header, removed = re.subn(
        r"(o\[i\] / sum_exp_score\);\n)\s*threadgroup_barrier\(mem_flags::mem_threadgroup\);",
        r"\1",
        flatten(["sdpa_vector.h"]),
        count=1,
    )
    assert removed == 1
    out, expected = sdpa(header, mode="fast")
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=2e-5)
    with pytest.raises(
        emulator.MetalError, match=r"race: .* writes .*`outputs\[simd_lid \* BD \+ simd_gid\] = o\[i\];`"
    ):
        sdpa(header, mode="check")
