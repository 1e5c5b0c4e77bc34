"""The process in which kernels are tried, with the emulator as its GPU. Variables say which sources, and how it fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "metal"))

import emulator
import mlx.core as mx

from flash_moe.ops import kernel, kernel_sources
from flash_moe.proofs import process, trial, trials


def misbehave(op: str, how: str) -> None:
    """Has every trial of an op end the process, or hang."""

    def crash(*sizes: object) -> None:
        print("a driver's last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    trials.TRIALS[op] = crash if how == "crash" else lambda *sizes: time.sleep(60)


if folder := os.environ.get("TEST_KERNELS"):
    kernel_sources.folder = lambda: Path(folder)
if fault := os.environ.get("TEST_FAULT"):
    misbehave(*fault.split(":"))
mx.fast.metal_kernel = emulator.metal_kernel
kernel.back_end = lambda: "metal"
mx.compile = lambda function: function  # the emulator evaluates, which a trace cannot
trial._timer = lambda *_: lambda: (1e-6, 2e-6)  # how fast the emulator is says nothing
process.main()
