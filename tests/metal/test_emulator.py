"""The emulator itself: its interface, its errors, and what it leaves behind."""

import os
import platform
import time

import emulator
import mlx.core as mx
import pytest
from emulator import build, clang


def kernel(source="out[thread_position_in_grid.x] = x[thread_position_in_grid.x];", **options):
    return emulator.metal_kernel("small", ["x"], ["out"], source, **options)


def call(made, threads=32, **options):
    arguments = {"inputs": [mx.ones(32)], "output_shapes": [(32,)], "output_dtypes": [mx.float32]}
    return made(**{**arguments, "grid": (32, 1, 1), "threadgroup": (threads, 1, 1), **options})


def test_stands_in_for_mlx(monkeypatch):
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    made = mx.fast.metal_kernel(name="small", input_names=["x"], output_names=["out"], source="out[0] = x[0];")
    assert isinstance(call(made, stream=mx.gpu)[0], mx.array)


def test_options():
    """A call's options come before its kernel's, and those before the surrounding ones."""
    racy = "out[0] = x[thread_position_in_grid.x];"
    call(kernel(racy))
    with emulator.options(mode="check"):
        with pytest.raises(emulator.MetalError, match=r"kernel 'small' \(check, forward order\)"):
            call(kernel(racy))
        call(kernel(racy, mode="nocontract"))
        with pytest.raises(emulator.MetalError, match="race"):
            call(kernel(racy, mode="fast"), mode="check")
    call(kernel(racy))


def test_wrong_options():
    with pytest.raises(ValueError, match="mode must be one of fast, nocontract, check, found 'quick'"):
        call(kernel(mode="quick"))
    with pytest.raises(ValueError, match="order must be one of"), emulator.options(order="sideways"):
        pass
    with pytest.raises(TypeError, match="schedule"):
        kernel(schedule="random")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threads": 1025}, "1025 threads per threadgroup, expected at most 1024"),
        ({"grid": (32, 0, 1)}, r"grid must be three positive numbers, found \(32, 0, 1\)"),
        ({"inputs": [mx.array([1j])]}, "complex64"),
    ],
    ids=["threads", "grid", "dtype"],
)
def test_wrong_calls(options, message):
    with pytest.raises(emulator.MetalError, match=message):
        call(kernel(), **options)


def test_wrong_template():
    with pytest.raises(ValueError, match="template"):
        call(kernel(), template=[("T", "float")])


def test_source_is_what_mlx_generates(capfd):
    call(kernel(header="// head\n"), verbose=True)
    printed = capfd.readouterr().out
    assert printed.startswith("// head\n[[kernel]] void custom_kernel_small")
    assert "const device float* x [[buffer(0)]]" in printed


def test_hang():
    begin = time.monotonic()
    with pytest.raises(
        emulator.MetalError, match=r"hang: not finished after 1 s; thread 0 is at small\.metal:1 `while"
    ):
        call(kernel("while (x[0] > 0.0f) { out[thread_position_in_grid.x] += x[1]; }"), timeout=1)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_memory_fault(mode):
    """Without instrumentation the guard page behind a buffer still catches an access."""
    with pytest.raises(
        emulator.MetalError, match=r"oob: .* past the end of buffer x \(128 bytes\), at small\.metal:1 `out"
    ):
        call(kernel("out[0] = x[thread_position_in_grid.x + 40];"), mode=mode)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 traps; check mode finds it everywhere")
def test_integer_division():
    with pytest.raises(emulator.MetalError, match=r"arithmetic: thread \d+ divides .* small\.metal:1"):
        call(kernel("out[0] = float(7 / (int(x[0]) - 1));"), mode="fast")


def test_leaves_no_process_and_no_file():
    with pytest.raises(emulator.MetalError):
        call(kernel("*(device float*)nullptr = x[0];".replace("nullptr", "(ulong(1) << 40)")))
    with pytest.raises(emulator.MetalError):
        call(kernel("out[0] = y;"))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    suffixes = {path.suffix for path in build.cache_folder().iterdir() if path.is_file()}
    assert suffixes <= {".pch", ".so", ".o", ".ok", ".error"}


def test_unavailable(monkeypatch):
    clang._search.cache_clear()
    monkeypatch.setenv("FLASH_MOE_CLANG", "no-such-compiler")
    reason = emulator.available()
    clang._search.cache_clear()
    assert reason.startswith("Metal emulator: needs clang >= 19 (FLASH_MOE_CLANG=no-such-compiler is missing or older)")
    assert "\n" not in reason
