"""Experts multiplied straight from records, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracles
import pytest
from small_floats import decoded

from flash_moe.formats import GLOBAL_SCALE, ProjectionFormat, Quantization
from flash_moe.ops.experts import experts_for_rows, experts_for_token
from flash_moe.packing.requantize import as_bytes
from flash_moe.record import PROJECTIONS, RecordLayout

HIDDEN, INTERMEDIATE = 128, 64
FORMATS = {
    "4-bit": [(4, 64)] * 3,
    "2-bit": [(2, 32)] * 3,
    "mixed": [(3, 32), (8, 64), (6, 32)],
    "plain": [None] * 3,
    "small floats": ["nvfp4 scaled", "mxfp4", "mxfp8"],
}


def make_records(
    count: int,
    formats: list[tuple[int, int] | str | None],
    dtype: str,
    rng: np.random.RandomState,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> tuple[mx.array, RecordLayout, list[list[np.ndarray]]]:
    """Records [count, words], their layout, and each expert's float64 matrices."""
    mlx_dtype = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype]
    fmts = {
        n: ProjectionFormat("U8", Quantization.of_mode(f.split()[0]), "scaled" in f)
        if isinstance(f, str)
        else ProjectionFormat(dtype, Quantization(*f) if f else None)
        for n, f in zip(PROJECTIONS, formats, strict=True)
    }
    layout = RecordLayout.build(hidden, intermediate, fmts)
    data = np.full((count, layout.stride), 0xA5, np.uint8)
    dense: list[list[np.ndarray]] = [[] for _ in range(count)]
    for name, fmt in zip(PROJECTIONS, formats, strict=True):
        rows, columns = (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        for e in range(count):
            w = mx.array(rng.randn(rows, columns) / columns**0.5).astype(mlx_dtype)
            if isinstance(fmt, str):
                mode = fmt.split()[0]
                arrays = tuple(mx.quantize(w.astype(mx.float32), mode=mode))
                values = decoded(np.array(arrays[0]), np.array(arrays[1]), mode)
                if fmts[name].global_scale:
                    arrays += (mx.array([rng.uniform(1000, 5000)]),)
                    values *= float(arrays[2]) / GLOBAL_SCALE
                dense[e].append(values)
            else:
                arrays = mx.quantize(w, bits=fmt[0], group_size=fmt[1]) if fmt else (w,)
            mine = [part for part in layout.parts if part.linear == name]
            for part, array in zip(mine, arrays, strict=True):
                data[e, part.offset : part.offset + part.nbytes] = as_bytes(array).reshape(-1)
            if isinstance(fmt, str):
                continue
            if fmt:
                words, scales, biases = (np.array(a if a.dtype == mx.uint32 else a.astype(mx.float32)) for a in arrays)
                dense[e].append(oracles.dequantize(words, scales.astype(float), biases.astype(float), *fmt))
            else:
                dense[e].append(np.array(w.astype(mx.float32), dtype=np.float64))
    return mx.array(data.view(np.uint32)), layout, dense


@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [1, 4, 10])
def test_one_token(k: int, fmt: str, dtype: str, each: bool) -> None:
    rng = np.random.RandomState(k)
    records, layout, dense = make_records(k, FORMATS[fmt], dtype, rng)
    x, weights = rng.randn(1, HIDDEN), rng.uniform(size=k)
    given = list(records) if each else records
    y = experts_for_token(mx.array(x.astype(np.float32)), given, mx.array(weights.astype(np.float32)), layout)
    expected = sum(w * oracles.swiglu_expert(x, *matrices) for w, matrices in zip(weights, dense, strict=True))
    np.testing.assert_allclose(np.array(y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("counts", [[1], [2, 1, 3], [40, 1, 7, 16]], ids=str)
def test_rows_sorted_by_expert(counts: list[int], fmt: str, dtype: str) -> None:
    rng = np.random.RandomState(sum(counts))
    records, layout, dense = make_records(len(counts), FORMATS[fmt], dtype, rng)
    x = rng.randn(sum(counts), HIDDEN)
    y = experts_for_rows(mx.array(x.astype(np.float32)), records, counts, layout)
    blocks = np.split(x, np.cumsum(counts)[:-1])
    expected = np.concatenate([oracles.swiglu_expert(b, *m) for b, m in zip(blocks, dense, strict=True)])
    np.testing.assert_allclose(np.array(y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("counts", [[1], [40, 1, 7, 16]], ids=str)
def test_plain_records_with_activations_of_16_bits(counts: list[int], dtype: mx.Dtype) -> None:
    rng = np.random.RandomState(sum(counts))
    records, layout, dense = make_records(len(counts), FORMATS["plain"], "BF16", rng)
    x = mx.array(rng.randn(sum(counts), HIDDEN)).astype(dtype)
    y = experts_for_rows(x, records, counts, layout)
    assert y.dtype == dtype
    blocks = np.split(np.array(x.astype(mx.float32), dtype=np.float64), np.cumsum(counts)[:-1])
    expected = np.concatenate([oracles.swiglu_expert(b, *m) for b, m in zip(blocks, dense, strict=True)])
    tolerance = 2e-2 if dtype == mx.bfloat16 else 3e-3
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), expected, rtol=tolerance, atol=tolerance)
