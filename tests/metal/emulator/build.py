"""Lints and compiles a kernel into a shared library, and keeps the results in a cache that processes can share."""

import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import clang
from .ast_lint import lint_ast
from .errors import MetalError
from .lint import lint_text
from .source import Source, prelude, translation_unit

RUNTIME = Path(__file__).parent / "runtime"
_KEEP_SECONDS = 30 * 24 * 3600


@functools.cache
def cache_folder() -> Path:
    """`FLASH_MOE_EMULATOR_CACHE`, or a folder in the user's cache."""
    named = os.environ.get("FLASH_MOE_EMULATOR_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else user / "flash_moe" / "metal_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
    return folder


def _forget_old(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > _KEEP_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _fixed_key() -> str:
    """Changes with the compiler, its flags, the prelude, the shim, the runtime and the lints."""
    here = Path(__file__).parent
    files = [here / "lint.py", here / "ast_lint.py", *sorted((here / "include").rglob("*")), *sorted(RUNTIME.iterdir())]
    texts = [path.read_bytes() for path in files if path.is_file()]
    flags = (clang.processor_flags(), clang.LANGUAGE, clang.MODES, clang.RUNTIME)
    return _key(clang.version(), flags, prelude(), texts)


def _cached(name: str, make: Callable[[Path], None], *, remember_failure: bool = False) -> Path:
    """The cached file `name`; `make(path)` writes it.

    A file appears under its name only when it is complete, so two processes can make the same one.

    Args:
        name: Of the file.
        make: Called when there is no such file.
        remember_failure: Whether a MetalError of `make` is cached as well: it must not depend on the machine.
    """
    path = cache_folder() / name
    failure = path.with_suffix(".error")
    if path.exists():
        os.utime(path)
        return path
    if remember_failure and failure.exists():
        raise MetalError(failure.read_text())
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        made = Path(folder, name)
        try:
            make(made)
        except MetalError as error:
            if remember_failure:
                made.write_text(str(error))
                made.replace(failure)
            raise
        made.replace(path)
    return path


def _runtime() -> Path:
    files = [str(path) for path in sorted(RUNTIME.glob("*.cpp"))]

    def make(path: Path) -> None:
        clang.run([*clang.RUNTIME, "-r", "-nostdlib", *files, "-o", str(path)])

    return _cached(f"runtime-{_fixed_key()}.o", make)


def _with_prelude(name: str, flags: list[str]) -> list[str]:
    """`flags`, and those that put the prelude, compiled once with the same flags, in front of every unit."""

    def make(path: Path) -> None:
        # a kernel is read in a fifth of the time that the prelude takes
        header = ["-x", "c++-header", "-Xclang", "-fno-pch-timestamp", "-", "-o", str(path)]
        clang.run([*flags, *header], prelude())

    return [*flags, "-include-pch", str(_cached(f"{name}-{_fixed_key()}.pch", make))]


def check(source: Source) -> None:
    """Raise MetalError unless the source is clean C++ with no lint reports. The same for every mode."""
    unit = translation_unit(source)

    def make(path: Path) -> None:
        problems = [problem for name, text in source.files.items() for problem in lint_text(name, text)]
        if not problems:
            path.write_text(unit)
            problems = lint_ast(path, source.files, _with_prelude("lint", clang.LANGUAGE))
        if problems:
            raise MetalError("\n".join(problems))
        path.write_text("")

    _cached(f"lint-{_key(_fixed_key(), unit)}.ok", make, remember_failure=True)


def build(source: Source, mode: str) -> Path:
    """The shared library of `source` compiled for `mode`.

    Raises:
        MetalError: When the source does not compile or breaks a rule of Metal.
    """
    check(source)
    unit = translation_unit(source)

    def make(path: Path) -> None:
        cpp = path.with_suffix(".cpp")
        cpp.write_text(unit)
        flags = [*clang.LANGUAGE, *clang.MODES[mode], *clang.processor_flags()]
        compiling = _with_prelude(mode, [*flags, "-w", "-g1", "-fPIC", "-fvisibility=hidden"])
        linking = ["-shared", "-nostdlib++", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-x", "none", str(_runtime())]
        clang.run([*compiling, str(cpp), *linking, "-lm", "-o", str(path)])

    return _cached(f"{mode}-{_key(_fixed_key(), unit)}.so", make)
