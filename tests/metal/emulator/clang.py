"""Finds clang and holds its flags. Knows nothing of kernels."""

import functools
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from .errors import MetalError

INCLUDE = Path(__file__).parent / "include"
OLDEST = 19  # the first with what the shim needs: ext_vector_type(N) aliases, __bf16 arithmetic

LANGUAGE = [
    *["-x", "c++", "-std=c++17", "-nostdinc", "-nostdinc++", "-fno-exceptions", "-fno-rtti", "-isystem", str(INCLUDE)],
    # as in Metal, a literal is single precision, and half and bfloat round after every operation
    *["-Xclang", "-cl-single-precision-constant"],
    *["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"],
    *["-Wno-unknown-attributes", "-Wno-duplicate-decl-specifier", "-Wno-unknown-pragmas", "-Wno-pass-failed"],
    *["-Werror=return-type", "-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=array-bounds"],
    *["-Werror=shift-count-overflow", "-Werror=vla-cxx-extension"],
    "-Werror=implicit-conversion-floating-point-to-bool",
]
MODES = {
    "fast": ["-O2", "-ffp-contract=on"],
    "nocontract": ["-O2", "-ffp-contract=off"],
    "check": [
        *["-O1", "-ffp-contract=on", "-fno-vectorize", "-fno-slp-vectorize"],
        # instrumentation only: the handlers are runtime/tsan.cpp and runtime/ubsan.cpp
        *["-fsanitize=thread", "-mllvm", "-tsan-compound-read-before-write=1"],
        # not `bounds`, whose other half can only trap
        "-fsanitize=array-bounds,alignment,shift-exponent,integer-divide-by-zero",
        "-fsanitize=float-cast-overflow,signed-integer-overflow",
        "-fsanitize-recover=all",
        "-ftrivial-auto-var-init=pattern",  # NaN in a variable that nothing initialised
    ],
}
RUNTIME = ["-std=c++17", "-O2", "-g1", "-fPIC", "-nostdinc++", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]


@functools.cache
def processor_flags() -> tuple[str, ...]:
    """Flags for hardware FMA and half conversions; without them the same operations are library calls."""
    if platform.machine() != "x86_64":
        return ()
    have = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    return ("-march=x86-64-v3",) if {"avx2", "bmi2", "f16c", "fma"} <= have else ()


def _version(compiler: str) -> tuple[int, str]:
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0, ""
    found = re.search(r"clang version (\d+)", text)
    return (int(found[1]) if found else 0), text.split("\n", 1)[0]


@functools.cache
def _search() -> tuple[str | None, str]:
    """The compiler and its version line, or None and the reason."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None, f"needs Linux on x86-64 or aarch64, this is {platform.system()} on {platform.machine()}"
    named = os.environ.get("FLASH_MOE_CLANG")
    for name in [named] if named else ["clang++-19", "clang++-20", "clang++-21", "clang++-22", "clang++"]:
        path = shutil.which(name)
        number, line = _version(path) if path else (0, "")
        if path and number >= OLDEST:
            return path, line
    looked = f"FLASH_MOE_CLANG={named}" if named else "clang++-19 to clang++-22 and clang++"
    return None, f"needs clang >= {OLDEST} ({looked} is missing or older): apt-get install clang-{OLDEST}"


def available() -> str | None:
    """None when the emulator can run here, or else the reason why not, in one line."""
    path, text = _search()
    return None if path else f"Metal emulator: {text}"


def compiler() -> str:
    """Path of clang++."""
    path, text = _search()
    if path is None:
        raise MetalError(f"Metal emulator: {text}")
    return path


def version() -> str:
    """The compiler's own description, for cache keys."""
    return _search()[1]


def run(arguments: list[str], text: str | None = None) -> str:
    """Run clang, with `text` as its standard input, and return what it prints; its complaints become a MetalError."""
    command = [compiler(), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 1 and "error:" in done.stderr and "unable to execute" not in done.stderr:
        raise MetalError(done.stderr.strip())
    if done.returncode:  # no fault of the kernel: out of memory, a crash, ...
        raise RuntimeError(f"{compiler()} failed with status {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
