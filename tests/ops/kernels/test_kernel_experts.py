"""The two expert kernels, each against float64, for every way in which records can be given."""

from __future__ import annotations

import emulator
import mlx.core as mx
import numpy as np
import oracles
import pytest
from sequence_oracles import DTYPES, error, float64, random
from test_experts import FORMATS, make_records

from flash_moe.ops import expert_kernels, kernel_sources
from flash_moe.ops.expert_kernels import down, experts_for_token, find_records, gate_up, supports
from flash_moe.ops.kernel import Kernel
from flash_moe.ops.quantized_matvec import FUSED, HOISTED, NAIVE

ROUNDINGS = 6  # of the float32 sums, relative to the sum of the absolute terms with w for scale * q and bias
HOW = ["bank", "rows", "separate", "shared"]

# bits and groups, hidden, intermediate, K, dtype of x, dtype of scales, how, residual, form
SMALL = [
    (FORMATS["4-bit"], 128, 64, 1, "bf16", "BF16", "bank", False, HOISTED),
    (FORMATS["mixed"], 192, 96, 4, "f16", "F32", "rows", True, HOISTED),
    (FORMATS["2-bit"], 96, 160, 10, "f32", "BF16", "separate", False, HOISTED),
    ([(5, 32), (4, 32), (2, 32)], 64, 32, 5, "bf16", "F16", "shared", True, FUSED),
    (FORMATS["small floats"], 128, 96, 2, "f32", "BF16", "bank", False, HOISTED),
    (["mxfp8", "nvfp4", "nvfp4 scaled"], 192, 64, 3, "bf16", "BF16", "shared", True, NAIVE),
    (["mxfp4", "mxfp8", "mxfp4"], 96, 64, 1, "f16", "BF16", "separate", True, FUSED),
]
REAL = [
    (FORMATS["4-bit"], 4096, 64, 2, "bf16", "BF16", "separate", True, HOISTED),
    (FORMATS["4-bit"], 64, 1024, 5, "bf16", "BF16", "shared", True, HOISTED),
    ([(3, 64), (3, 64), (6, 64)], 2048, 512, 1, "f16", "F16", "bank", False, NAIVE),
]
CASES = [
    *[pytest.param(*case, "check", id=f"small{i}-check") for i, case in enumerate(SMALL)],
    *[pytest.param(*case, "fast", id=f"real{i}-fast") for i, case in enumerate(REAL)],
    *[pytest.param(*case, "nocontract", id=f"real{i}-nocontract") for i, case in enumerate(REAL[:2])],
]


def give(records: mx.array, how: str) -> dict[str, object]:
    """The same records as each kind of argument of experts_for_token."""
    count = records.shape[0]
    if how == "rows":
        bank = mx.concatenate([mx.full((1, records.shape[1]), 0xFFFFFFFF, mx.uint32), records[::-1]])
        return {"records": bank, "rows": list(range(count, 0, -1))}
    if how == "separate":
        return {"records": [mx.contiguous(records[k]) for k in range(count)]}
    if how == "shared":
        return {"records": records[:-1], "shared": mx.contiguous(records[-1])}
    return {"records": records}


@pytest.mark.parametrize(
    "formats, hidden, inner, k, x_dtype, dtype, how, residual, form, mode", CASES, indirect=["mode"]
)
def test_experts(
    formats: list[tuple[int, int] | None], hidden: int, inner: int, k: int, x_dtype: str, dtype: str, how: str,
    residual: bool, form: int, mode: str,
) -> None:  # fmt: skip
    rng = np.random.RandomState(k)
    records, layout, dense = make_records(k, formats, dtype, rng, hidden, inner)
    assert supports(layout, k)
    x, r = random(rng, (1, hidden), DTYPES[x_dtype]), random(rng, (1, hidden), DTYPES[x_dtype])
    given = give(records, how)
    source = find_records(given["records"], given.get("rows"), given.get("shared"))

    h = gate_up(x, source, k, layout, form)
    gates, ups, downs = (np.stack([matrices[i] for matrices in dense]) for i in range(3))
    gate, up = gates @ float64(x)[0], ups @ float64(x)[0]  # [K, I]
    gate_size, up_size = np.abs(gates) @ np.abs(float64(x)[0]), np.abs(ups) @ np.abs(float64(x)[0])
    silu = gate * oracles.sigmoid(gate)
    size = 1.1 * np.abs(up) * gate_size + np.abs(silu) * up_size + np.abs(silu * up)
    assert error(h, silu * up, ROUNDINGS * size) <= 1

    weights = mx.array(rng.uniform(size=k).astype(np.float32))
    y = down(h, source, weights, r if residual else None, layout, form)
    w, added = float64(weights), float64(r) if residual else 0.0
    expected = added + np.einsum("k,koi,ki->o", w, downs, float64(h))[None]
    size = np.abs(added) + np.einsum("k,koi,ki->o", w, np.abs(downs), np.abs(float64(h)))[None]
    assert y.dtype == x.dtype
    assert error(y, expected, ROUNDINGS * size) <= 1


@pytest.mark.parametrize("how", HOW)
def test_ways_to_give_records_agree_bit_for_bit(how: str) -> None:
    rng = np.random.RandomState(0)
    records, layout, _ = make_records(3, FORMATS["4-bit"], "BF16", rng)
    x, weights = random(rng, (1, 128), mx.bfloat16), mx.array([0.5, 0.25, 0.75])
    expected = experts_for_token(x, records, weights, layout)
    y = experts_for_token(x, weights=weights, layout=layout, **give(records, how))
    assert mx.array_equal(y, expected)


def test_silu_of_very_negative_gates_is_zero() -> None:
    rng = np.random.RandomState(0)
    records, layout, _ = make_records(1, FORMATS["4-bit"], "F32", rng)
    x = random(rng, (1, 128), mx.float32, 1e4)
    y = experts_for_token(x, records, mx.array([1.0]), layout)
    assert np.isfinite(np.array(y)).all()


def test_plain_records_are_left_to_others() -> None:
    _, layout, _ = make_records(1, FORMATS["plain"], "F32", np.random.RandomState(0))
    assert not supports(layout, 1)


MUTATIONS = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "race|uninit"),
    "barrier of a simdgroup": ("threadgroup_barrier(mem", "simdgroup_barrier(mem", "race"),
    "rows of a tile overlap": ("k * TILE + first + r", "k * TILE + r", "race|uninit"),
}


@pytest.mark.emulator
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_faults_are_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, report = MUTATIONS[mutation]
    made = expert_kernels.down_kernel(0, False, False)
    broken = Kernel(made.name, made.inputs, made.outputs)
    broken.header, broken.body = made.header, kernel_sources.read("expert_down.metal").replace(good, bad)
    assert broken.body != made.body
    monkeypatch.setattr(expert_kernels, "down_kernel", lambda *_: broken)
    rng = np.random.RandomState(0)
    records, layout, _ = make_records(3, FORMATS["4-bit"], "BF16", rng)
    with pytest.raises(emulator.MetalError, match=report), emulator.options(mode="check", order="random"):
        experts_for_token(random(rng, (1, 128), mx.bfloat16), records, mx.array([0.5, 0.25, 0.75]), layout)
