"""Benchmarks find what they import: they are run by hand, long after the library has changed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "path", list(sys.path))  # some of them change it
    kept = set(sys.modules)
    importlib.import_module(name)
    for module in set(sys.modules) - kept:
        if (file := getattr(sys.modules[module], "__file__", None)) and Path(file).parent == FOLDER:
            del sys.modules[module]
