"""Compiles kernels with Numba once per machine, and stores the compiled code in the user's cache folder.

Numba reuses stored code if the function itself is unchanged, but it does not check the functions that it calls. So the
name of the folder is a digest of all sources of the kernels.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, njit, types

from ...user_cache import cache_file

_log = logging.getLogger(__name__)
_FAST = {"fastmath": {"reassoc", "nsz", "contract", "arcp"}, "error_model": "numpy"}
MATRIX = types.float32[:, ::1]
_KEPT = 3  # number of folders of other versions that are kept


def helper(python: Callable[..., Any]) -> Any:
    """Marks a function that is compiled into its callers."""
    return njit(**_FAST)(python)


def kernel(arguments: int) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a C function with ``arguments`` int64 arguments, which is called by address."""
    return _compile(cfunc(types.void(*(types.int64,) * arguments), cache=folder() is not None, **_FAST))


def function(*arguments: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function that Python calls with these argument types, and that releases the GIL."""
    return _compile(njit([types.void(*arguments)], cache=folder() is not None, nogil=True, **_FAST))


def _compile(decorate: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    def compiled(python: Callable[..., Any]) -> Any:
        with _cache_in(folder()):
            return decorate(python)

    return compiled


@cache
def folder() -> Path | None:
    """Returns the folder for compiled code; None if no folder is writable."""
    given = numba.config.CACHE_DIR  # NUMBA_CACHE_DIR
    base = Path(given) if given else cache_file("kernels")
    digest = hashlib.sha256(numba.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    own = base / digest.hexdigest()[:16]
    try:
        if not own.is_dir():
            own.mkdir(parents=True)
            _log.warning("compiling kernels for this CPU, some seconds; the next start finds them in %s", own)
            _forget(base, own)
        if not os.access(own, os.W_OK):
            raise PermissionError(f"{own} cannot be written")
    except OSError as error:
        _log.warning("kernels for the CPU are compiled anew every time: %s; set NUMBA_CACHE_DIR", error)
        return None
    return own


def _forget(base: Path, own: Path) -> None:
    """Deletes the folders of old versions."""
    others = sorted((f for f in base.iterdir() if f.is_dir() and f != own), key=lambda f: f.stat().st_mtime)
    for old in others[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _cache_in(place: Path | None) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = "" if place is None else str(place)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
