"""Where the kernels' sources are."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def folder() -> Path:
    """The folder of the Metal sources: inside the installed package, or at the top of a clone."""
    installed = Path(__file__).parent.parent / "kernels"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "kernels"


@cache
def read(name: str) -> str:
    """The text of one source file, by its name."""
    return (folder() / name).read_text(encoding="utf-8")
