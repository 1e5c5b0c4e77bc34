"""Every trial on the emulator: right kernels pass, and wrong ones are told from them, also where few values are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.ops import expert_kernels
from flash_moe.ops.dispatch import Case
from flash_moe.proofs import trial
from flash_moe.proofs.trial import Trial, judge
from flash_moe.proofs.trials import TRIALS, trial_of
from flash_moe.record import PROJECTIONS, ProjectionFormat, Quantization, RecordLayout

FORMATS = dict.fromkeys(PROJECTIONS, ProjectionFormat("BF16", Quantization(4, 32)))
LAYOUT = json.dumps(RecordLayout.build(64, 32, FORMATS).to_json())
MODES = ("nvfp4", True), ("mxfp4", False), ("mxfp8", False)
SMALL_FLOATS = {
    name: ProjectionFormat("U8", Quantization.of_mode(mode), scaled)
    for name, (mode, scaled) in zip(PROJECTIONS, MODES, strict=True)
}
CASES: list[Case] = [
    ("quantized_matvec", 1, 128, 48, 4, 64, "bfloat16", "bfloat16"),
    ("quantized_matvec", 3, 96, 20, 3, 32, "float32", "float16"),
    ("experts", 3, 3, 1, LAYOUT, "bfloat16"),
    ("experts", 1, 2, 0, LAYOUT, "float16"),
    ("experts", 2, 2, 1, json.dumps(RecordLayout.build(64, 32, SMALL_FLOATS).to_json()), "float32"),
    ("router", 512, 4, 1, 1, "bfloat16"),
    ("router", 16, 4, 0, 0, "float32"),
    ("attention", 4, 2, 32, 8, "bfloat16"),
    ("delta_net", 1, 2, 16, 16, 4, "float16"),
    ("add_rms_norm", 100, "bfloat16"),
    ("delta_chunks", 1, 2, 16, 16, "bfloat16"),
]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_timer", lambda *_: lambda: (1e-6, 2e-6))


def test_every_op_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(TRIALS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[-1]}")
def test_right_kernels_are_used(case: Case) -> None:
    verdict = judge(trial_of(case))
    assert verdict.used, verdict.reason
    assert verdict.error < verdict.tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_two_logits_of_a_router_are_alike(dtype: str) -> None:
    logits, _ = trial_of(("router", 1024, 4, 1, 1, dtype)).operands()
    assert all(len(np.unique(row)) == 1024 for row in np.array(logits.astype(mx.float32)))


def test_the_experts_of_mlx_compute_the_same() -> None:
    tried = trial_of(CASES[2])
    operands = tried.operands()
    (found,) = tried.usual(*operands)
    assert max(trial._errors(found, tried.reference(*operands)[0])) < 1e-2


def test_experts_are_timed_without_any_other_op(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial_of(CASES[2])
    x, residual, weights, rows, bank, last, *_ = operands = tried.operands()
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(expert_kernels, "experts_for_token", lambda *a, **named: calls.append((*a[:3], named)) or x)
    assert tried.timed is not None
    tried.timed(*operands)
    ((*given, named),) = calls
    assert all(a is b for a, b in zip(given, (x, bank, weights), strict=True))
    assert named["rows"] is rows and named["shared"] is last and named["residual"] is residual


def changed(tried: Trial, change: Callable[[list[mx.array]], list[mx.array]]) -> Trial:
    return replace(tried, kernel=lambda *a: change(list(tried.kernel(*a))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[-1]}")
@pytest.mark.parametrize("output", [0, -1], ids=["first output", "last output"])
def test_a_kernel_that_is_off_by_a_few_percent_is_wrong(case: Case, output: int) -> None:
    def scale(found: list[mx.array]) -> list[mx.array]:
        found[output] = found[output] * 1.03 + (0.01 if case[0] == "router" else 0)
        return found

    verdict = judge(changed(trial_of(case), scale))
    assert not verdict.right
    assert "error" in verdict.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_single_value_that_is_not_written_is_wrong(value: float) -> None:
    def spoil(found: list[mx.array]) -> list[mx.array]:
        y = found[0]
        largest = mx.argmax(mx.abs(y)).item()
        return [mx.where(mx.arange(y.size)[None] == largest, value, y)]

    assert not judge(changed(trial_of(CASES[0]), spoil)).right


def test_a_slower_kernel_is_right_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_timer", lambda *_: lambda: (2e-6, 1e-6))
    verdict = judge(trial_of(CASES[0]))
    assert verdict.right
    assert not verdict.used
    assert verdict.reason == "it takes 2.0 µs, MLX 1.0 µs"


@pytest.mark.parametrize("mlx, traced", [(0.05, False), (0.01, True)])
def test_ops_of_mlx_are_traced_where_that_may_decide(mlx: float, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tracing: list[object] = []
    monkeypatch.setattr(mx, "compile", lambda function: tracing.append(function) or function)
    monkeypatch.setattr(trial, "_rounds", lambda run, flat: lambda: run(*flat)[0][0])
    tried = replace(
        trial_of(CASES[0]), timed=lambda *_: [0.004], usual=lambda *_: [mlx], operands=lambda: (mx.zeros(1 << 25),)
    )
    times = trial._timer(tried, tried.operands())
    assert times() == (0.004, mlx)
    assert len(tracing) == 1 + traced
