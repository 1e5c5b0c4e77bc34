"""Locates files that come with the library: kernel sources and the demo model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_INSTALLED = Path(__file__).parent / "_shipped"  # pyproject.toml puts the files there in a wheel


@cache
def shipped(name: str) -> Path:
    """Returns a folder by name, e.g. ``"kernels"``, in the installed package or at the top of a clone."""
    return (_INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2]) / name
