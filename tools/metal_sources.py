"""Writes the Metal source of every kernel to a folder, as MLX hands it to Apple's compiler. Needs no GPU.

    python tools/metal_sources.py FOLDER             # on any machine
    python tools/metal_sources.py FOLDER --check     # on Linux: each has to pass the front end of the tests' emulator
    python tools/metal_sources.py FOLDER --compile   # on a Mac with Xcode: each has to pass `xcrun metal`

The sizes are those of Qwen3.5-397B-A17B, with every dtype and bit width that `flash-moe selftest` tries.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "metal"))
import emulator  # noqa: E402
from emulator.source import Source  # noqa: E402

from flash_moe.ops import kernel  # noqa: E402
from flash_moe.proofs.standard import standard_cases  # noqa: E402
from flash_moe.proofs.trials import trial_of  # noqa: E402

PROLOGUE = '#include <metal_stdlib>\nusing namespace metal;\n#include "mlx/backend/metal/kernels/utils.h"\n'
INCLUDE = Path(mx.__file__).parent / "include"  # comes with MLX


class Recorder:
    """Takes the place of `mx.fast.metal_kernel`: notes what MLX generates, and computes nothing."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def metal_kernel(self, **definition: Any) -> Any:
        made = emulator.metal_kernel(**definition)

        def launch(
            *, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, init_value: object = None, **call: Any
        ) -> list[mx.array]:
            arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
            source = made.source(arrays, output_shapes=output_shapes, output_dtypes=output_dtypes, **call)
            self.sources[f"{made.name}-{hashlib.sha256(text_of(source).encode()).hexdigest()[:8]}"] = source
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch


@contextmanager
def recording() -> Iterator[Recorder]:
    """Within, kernels are launched as on a Mac, and recorded."""
    recorder = Recorder()
    before = mx.fast.metal_kernel, kernel.back_end
    mx.fast.metal_kernel, kernel.back_end = recorder.metal_kernel, lambda: "metal"
    try:
        yield recorder
    finally:
        mx.fast.metal_kernel, kernel.back_end = before


def text_of(source: Source) -> str:
    """Returns all that MLX generates, without its own headers."""
    return source.header + source.signature + source.body + source.tail


def metal_sources(dtypes: Sequence[str] = ("bfloat16", "float16", "float32")) -> dict[str, Source]:
    """Returns every kernel's source by a name that tells apart what its templates and headers make of it."""
    with recording() as recorder:
        for case in standard_cases(tuple(dtypes)):
            trial = trial_of(case)
            trial.kernel(*trial.operands())
    return recorder.sources


def compile_with_xcrun(file: Path) -> str:
    """Returns what Apple's compiler has against a source, or nothing."""
    command = ["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-Wno-unused", "-I", INCLUDE, "-c", file]
    done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=False)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else ""


def check_with_emulator(source: Source) -> str:
    """Returns what the front end of the tests' emulator has against a source, or nothing."""
    try:
        emulator.check(source)
    except emulator.MetalError as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.check and (reason := emulator.available()):
        sys.exit(reason)
    options.folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, source in sorted(metal_sources().items()):
        file = options.folder / f"{name}.metal"
        file.write_text(PROLOGUE + text_of(source))
        problems = [check_with_emulator(source)] if options.check else []
        problems += [compile_with_xcrun(file)] if options.compile else []
        failures += any(problems)
        print(file.name, "failed" if any(problems) else "ok" if problems else "written", *filter(None, problems))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
