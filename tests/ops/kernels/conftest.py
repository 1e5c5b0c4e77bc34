"""Kernels run on the emulator in `tests/metal`; without a suitable clang these tests are skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "metal"), str(TESTS / "ops")]  # the emulator, and the oracles of all ops

import emulator  # noqa: E402

from flash_moe.ops import kernel  # noqa: E402


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Every kernel of the library runs on the emulator, or on the GPU where there is one."""
    if kernel.back_end() is not None:
        if request.node.get_closest_marker("emulator"):
            pytest.skip("only the emulator reports faults")
        return
    if reason := emulator.available():
        pytest.skip(reason)
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(kernel, "back_end", lambda: "metal")


MODES = {
    "check": {"mode": "check", "order": "random"},
    "fast": {"mode": "fast", "order": "reverse"},
    "nocontract": {"mode": "nocontract"},
}


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The emulator's mode for one test, named by an indirect parameter."""
    with emulator.options(**MODES[request.param]):
        yield request.param
