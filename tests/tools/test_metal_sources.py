"""Every kernel's Metal source, as Apple's compiler will get it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from metal_sources import Source, check_with_emulator, emulator, metal_sources, text_of

from flash_moe.ops import kernel
from flash_moe.ops.kernel_sources import folder

KERNELS = {file.stem for file in folder().glob("*.metal") if not file.stem.endswith(".h")}
DEFINES = re.compile(r"(_[0-9a-f]{8})?-[0-9a-f]{8}$")


@pytest.fixture(scope="module")
def written() -> dict[str, Source]:
    return metal_sources(["float32"])


def test_no_kernel_is_missing(written: dict[str, Source]) -> None:
    assert KERNELS - {DEFINES.sub("", name) for name in written} <= {"rms_norm"}  # which no op launches


def test_recording_leaves_nothing_behind(written: dict[str, Source]) -> None:
    assert kernel.mx.fast.metal_kernel.__module__ != "metal_sources"
    assert kernel.back_end() != "metal" or kernel.mx.metal.is_available()


def test_the_front_end_accepts_a_kernel_and_refuses_a_broken_one(written: dict[str, Source], tmp_path: Path) -> None:
    if reason := emulator.available():
        pytest.skip(reason)
    source = next(source for name, source in written.items() if name.startswith("add_rms_norm-"))
    assert "[[kernel]] void" in text_of(source)
    assert check_with_emulator(source) == ""
    broken = Source(**vars(source) | {"body": source.body + "\ndouble never = 1;\n"})
    assert "Metal has no double" in check_with_emulator(broken)
