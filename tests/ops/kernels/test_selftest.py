"""`flash-moe selftest` on the emulator, at small sizes."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flash_moe import FlashMoEError, selftest
from flash_moe.ops import kernel
from flash_moe.selftest import Sizes, run

SMALL = Sizes(
    hidden=64, intermediate=64, experts=16, heads=4, kv_heads=2, head_dim=32, key_heads=1, value_heads=2, delta_dim=16,
    context=40,
)  # fmt: skip


@pytest.fixture(autouse=True)
def float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "TOLERANCE", {mx.float32: 1e-4})
    monkeypatch.setattr(selftest, "_CALLS", 1)


def test_all_kernels_pass() -> None:
    results = list(run(SMALL, seed=1))
    assert len(results) == 12
    assert [r.name for r in results if not r.passed] == []
    assert all(r.seconds > 0 and r.mlx_seconds > 0 for r in results)


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.norm_kernel.rms_norm_kernel
    monkeypatch.setattr(selftest.norm_kernel, "rms_norm_kernel", lambda *a: right(*a) * 1.001)
    assert [r.name for r in run(SMALL, seed=1) if not r.passed] == ["RMSNorm"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "back_end", lambda: None)
    with pytest.raises(FlashMoEError, match="no GPU"):
        next(run(SMALL))
