"""A notebook: the kernel of Jupyter runs cells as a user would, some of them twice."""

from __future__ import annotations

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.clients

LOAD = "from flash_moe import Model\nmodel = Model.load('demo')\nmodel"
ASK = "reply = model.generate('What is K?', temperature=0.0)\nprint(reply.text)\nstr(reply.stats)"
STREAM = "for chunk in model.stream('What is K?', temperature=0.0):\n    print(chunk.text, end='')"


def text(cell: nbformat.NotebookNode, kind: str) -> str:
    """What a cell printed, or the text of its value."""
    if kind == "stdout":
        return "".join(out["text"] for out in cell.outputs if out.get("name") == "stdout")
    return "".join(out["data"]["text/plain"] for out in cell.outputs if out.output_type == "execute_result")


def test_cells_that_load_ask_and_stream() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (LOAD, ASK, LOAD, STREAM)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    load, ask, again, stream = notebook.cells
    assert "demo" in text(load, "value") and text(again, "value") == text(load, "value")
    assert text(ask, "stdout").strip() and text(ask, "stdout").strip() == text(stream, "stdout").strip()
    assert "tok/s" in text(ask, "value")
    assert not [out for cell in notebook.cells for out in cell.outputs if out.get("name") == "stderr"]
