"""Every barrier of the norms and mixers is needed: without it the emulator reports a race or an unwritten read."""

from __future__ import annotations

import emulator
import mlx.core as mx
import pytest

from flash_moe.ops import decode_attention, delta_net_step, norm_kernel
from flash_moe.ops.kernel import Kernel

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
KERNELS = {
    "add_rms_norm": norm_kernel._KERNEL,
    "decode_attention": decode_attention._PARTIAL,
    "delta_net_step": delta_net_step._KERNEL,
}
BARRIERS = [(name, i) for name, kernel in KERNELS.items() for i in range(kernel.body.count(BARRIER))]


def launch(name: str) -> None:
    row, weight = mx.ones((2, 300)), mx.ones((300,))
    if name == "add_rms_norm":
        norm_kernel.add_rms_norm_kernel(row, row, weight, 1e-6)
    elif name == "decode_attention":
        q, cache, gate = mx.ones((6, 1, 64)), mx.ones((2, 80, 64)), mx.ones((1, 6 * 64))
        decode_attention.decode_attention_kernel(q, cache, cache, decode_attention.cache_sizes(70, cache), gate, 0.125)
    else:
        projected, conv, state = (mx.ones(shape) for shape in [(1, 132), (3, 96), (2, 16, 32)])
        constants = delta_net_step.pack_constants(-mx.ones(2), mx.ones(2), mx.ones(16), l2_eps=1e-6, eps=1e-6)
        delta_net_step.delta_net_step_kernel(
            projected, conv, state, conv_weight=mx.ones((4, 96)), constants=constants, key_heads=1
        )


def without_barrier(body: str, index: int) -> str:
    parts = body.split(BARRIER)
    return BARRIER.join(parts[: index + 1]) + BARRIER.join(parts[index + 1 :])


@pytest.mark.emulator
@pytest.mark.parametrize("name, index", BARRIERS)
def test_a_missing_barrier_is_caught(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Kernel = KERNELS[name]
    monkeypatch.setattr(kernel, "body", without_barrier(kernel.body, index))
    monkeypatch.setattr(kernel, "_compiled", {})
    with emulator.options(mode="check", order="random"), pytest.raises(emulator.MetalError, match=r"race|uninit"):
        launch(name)


@pytest.mark.parametrize("name", KERNELS)
def test_the_intact_kernel_is_clean(name: str) -> None:
    with emulator.options(mode="check", order="random"):
        launch(name)
