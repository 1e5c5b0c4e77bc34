"""What pyproject.toml says is what the source needs."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_ANOTHER = {
    "llvmlite": "numba",
    "pydantic-core": "pydantic",
    "transformers": "mlx-lm",
    "typing-extensions": "pydantic",
}  # each comes with a package that is declared
USED_WITHOUT_AN_IMPORT = {"mlx-lm"}  # imported by name


def imported() -> set[str]:
    """Every package that the library imports, anywhere, under its name on PyPI."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return {name.lower().replace("_", "-") for name in found - set(sys.stdlib_module_names) - {"flash_moe"}}


def declared() -> set[str]:
    """Every package that a user gets with the library or with one of its extras."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name in ("dev", "ci", "clients", "docs", "train"):
        extras.pop(name, None)
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}  # type: ignore[index]


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    needed = {WITH_ANOTHER.get(name, name) for name in imported()}
    assert needed - declared() == set()
    assert declared() - needed <= USED_WITHOUT_AN_IMPORT


def test_every_dependency_has_a_lower_bound() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    assert [line for line in lines if ">=" not in line and not line.startswith("flash-moe[")] == []
