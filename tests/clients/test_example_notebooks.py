"""The notebooks of examples/ run in a kernel, and are stored with the outputs that a reader needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from notebooks import EXAMPLES, run  # noqa: E402

pytestmark = pytest.mark.clients
NAMES = ["first_steps", "tools_and_formats", "watching_experts"]


def kinds(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """What kinds of outputs each cell has, without the bars of a slow machine; texts that came one after the other are one."""
    found = []
    for cell in notebook.cells:
        outputs = [
            out for out in cell.get("outputs", ()) if "reading the prompt" not in str(out) and "loading" not in str(out)
        ]
        each = [tuple(sorted(out.get("data", {out.output_type: 0}))) for out in outputs]
        found.append([kind for i, kind in enumerate(each) if kind != ("stream",) or each[i - 1 : i] != [kind]])
    return found


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_is_stored_with_its_outputs(name: str) -> None:
    stored = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(stored)
    assert any(kinds(stored)) and "/home/" not in str(stored) and "/root/" not in str(stored)
    assert not [out for cell in stored.cells for out in cell.get("outputs", ()) if out.get("name") == "stderr"]
    assert kinds(run(EXAMPLES / f"{name}.ipynb")) == kinds(stored)
