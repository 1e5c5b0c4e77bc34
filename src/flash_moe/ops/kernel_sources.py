"""Reads the sources of kernels."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..shipped import shipped


def folder() -> Path:
    """Returns the folder of the Metal sources."""
    return shipped("kernels")


@cache
def read(name: str) -> str:
    """Returns the text of a source file by name."""
    return (folder() / name).read_text(encoding="utf-8")
