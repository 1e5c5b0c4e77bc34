"""Tests with real clients: SDKs, a browser, notebooks. `make test-clients` runs them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))  # the scripted model

if find_spec("anthropic") is None:  # `make test` collects this folder, too, and needs no clients
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kernels of notebooks and drivers of browsers leave to the garbage collector is not ours to close."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
