"""Files that come with the library and are not Python: the kernels' sources, and the demo model."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def shipped(name: str) -> Path:
    """A folder by its name, e.g. ``"kernels"``: inside the installed package, or at the top of a clone."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[2] / name
