"""The example kernels give the right numbers for every type, shape, mode and order: how to test a kernel."""

import mlx.core as mx
import pytest
from matvec import SOURCE, STAGED, Case, run

DTYPES = pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=["bf16", "f16", "f32"])
SOURCES = pytest.mark.parametrize("source", [SOURCE, STAGED], ids=["plain", "staged"])


@pytest.mark.parametrize("mode, order", [("check", "random"), ("fast", "reverse"), ("nocontract", "forward")])
@DTYPES
@SOURCES
def test_matvec(source, dtype, mode, order):
    case = Case.random(64, 2048, dtype)
    assert case.error(run(case, source, mode=mode, order=order)) <= 1


@pytest.mark.parametrize("rows, columns", [(4, 64), (12, 192), (60, 4160)])
@SOURCES
def test_ragged_shapes(source, rows, columns):
    case = Case.random(rows, columns, mx.bfloat16)
    assert case.error(run(case, source, mode="check", order="random")) <= 1


@pytest.mark.parametrize("simdgroups", [1, 3, 8])
def test_threadgroup_sizes(simdgroups):
    case = Case.random(64, 2048, mx.float16)
    assert case.error(run(case, STAGED, simdgroups=simdgroups, mode="check")) <= 1
