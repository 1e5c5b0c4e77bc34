"""Files that come with the library and are not Python: the kernels' sources, and the demo model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_INSTALLED = Path(__file__).parent / "_shipped"  # pyproject.toml puts them there in a wheel


@cache
def shipped(name: str) -> Path:
    """Returns a folder by its name, e.g. ``"kernels"``: inside the installed package, or at the top of a clone."""
    return (_INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2]) / name
