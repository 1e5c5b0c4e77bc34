"""The quantised matrix-vector product against float64, for every bit width and form."""

from __future__ import annotations

import emulator
import mlx.core as mx
import numpy as np
import oracles
import pytest
from sequence_oracles import DTYPES, error, float64, random

from flash_moe.formats import Quantization
from flash_moe.ops import kernel_sources
from flash_moe.ops import quantized_matvec as module
from flash_moe.ops.quantized_matvec import FUSED, HOISTED, NAIVE, lanes_per_row, quantized_matvec, supports

ROUNDINGS = 2  # of the float32 sums, relative to the sum of the absolute terms

# out, in, tokens, bits, group, dtype of x, dtype of scales, form
SMALL = [
    (7, 64, 1, 4, 64, "bf16", "bf16", HOISTED),
    (3, 96, 2, 2, 32, "f16", "f16", HOISTED),
    (1, 160, 1, 3, 32, "f32", "bf16", HOISTED),
    (5, 576, 3, 5, 64, "bf16", "f32", NAIVE),
    (33, 128, 8, 6, 128, "f16", "bf16", FUSED),
    (6, 1088, 5, 8, 64, "f32", "f16", HOISTED),
    (2, 64, 1, 8, 32, "bf16", "bf16", FUSED),
]
REAL = [
    (32, 4096, 1, 4, 64, "bf16", "bf16", HOISTED),
    (32, 4096, 1, 4, 64, "bf16", "bf16", FUSED),
    (32, 4096, 1, 4, 64, "f16", "f16", NAIVE),
    (16, 2048, 8, 4, 64, "bf16", "bf16", HOISTED),
    (16, 4096, 1, 2, 64, "f32", "bf16", HOISTED),
    (16, 1536, 1, 3, 128, "f16", "f16", HOISTED),
    (16, 4096, 1, 8, 64, "bf16", "bf16", HOISTED),
]
CASES = [
    *[pytest.param(*case, "check", id=f"small{i}-check") for i, case in enumerate(SMALL)],
    *[pytest.param(*case, "fast", id=f"real{i}-fast") for i, case in enumerate(REAL)],
    *[pytest.param(*case, "nocontract", id=f"real{i}-nocontract") for i, case in enumerate(REAL[:3])],
]


def make_case(
    out: int, columns: int, tokens: int, bits: int, group: int, x_dtype: str, dtype: str
) -> tuple[list[mx.array], np.ndarray, np.ndarray]:
    """Arguments x, weight, scales, biases; the exact product; the sum of its absolute terms."""
    rng = np.random.RandomState(bits)
    words = mx.array(rng.randint(0, 1 << 32, (out, columns * bits // 32), dtype=np.uint32))
    groups = (out, columns // group)
    scales = mx.array(rng.uniform(0.5, 1, groups).astype(np.float32) / 2**bits).astype(DTYPES[dtype])
    biases = mx.array(rng.uniform(-0.6, -0.4, groups).astype(np.float32)).astype(DTYPES[dtype])
    x = random(rng, (tokens, columns), DTYPES[x_dtype])
    exact = [np.array(words), float64(scales), float64(biases)]
    w = oracles.dequantize(*exact, bits, group)
    absolute = oracles.dequantize(exact[0], exact[1], np.abs(exact[2]), bits, group)
    return [x, words, scales, biases], float64(x) @ w.T, np.abs(float64(x)) @ absolute.T


@pytest.mark.parametrize("out, columns, tokens, bits, group, x_dtype, dtype, form, mode", CASES, indirect=["mode"])
def test_matvec(
    out: int, columns: int, tokens: int, bits: int, group: int, x_dtype: str, dtype: str, form: int, mode: str
) -> None:
    arguments, expected, magnitude = make_case(out, columns, tokens, bits, group, x_dtype, dtype)
    y = quantized_matvec(*arguments, Quantization(bits, group), form=form)
    assert y.dtype == DTYPES[x_dtype]
    assert error(y, expected, ROUNDINGS * magnitude) <= 1


@pytest.mark.parametrize(
    "columns, lanes", [(4096, 16), (1024, 16), (96 * 32, 16), (512, 16), (64, 8), (256, 8), (31 * 32, 16)]
)
def test_lanes_are_kept_busy(columns: int, lanes: int) -> None:
    assert lanes_per_row(columns) == lanes


def test_toys_and_many_tokens_are_left_to_others() -> None:
    q, x = Quantization(4, 32), mx.zeros((1, 32))
    assert supports(x, mx.zeros((2, 4), dtype=mx.uint32), q)
    assert not supports(x, mx.zeros((1, 4), dtype=mx.uint32), q)
    assert not supports(mx.zeros((9, 32)), mx.zeros((2, 4), dtype=mx.uint32), q)
    assert not supports(x, mx.zeros((2, 32)), None)


MUTATIONS = {
    "row past the end": ("metal::min(row0 + r, uint(OUT - 1))", "row0 + r", "oob"),
    "write past the end": ("lane == 0 && row0 + r < uint(OUT)", "lane == 0", "oob"),
    "every lane writes": ("lane == 0 && ", "", "race"),
}


@pytest.mark.emulator
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_faults_are_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, report = MUTATIONS[mutation]
    broken = module.Kernel("quantized_matvec", module._kernel.inputs, ["y"], ["quantized"])
    broken.body = kernel_sources.read("quantized_matvec.metal").replace(good, bad)
    monkeypatch.setattr(module, "_kernel", broken)
    arguments, _, _ = make_case(7, 64, 1, 4, 64, "bf16", "bf16")
    with pytest.raises(emulator.MetalError, match=report), emulator.options(mode="check"):
        quantized_matvec(*arguments, Quantization(4, 64))
