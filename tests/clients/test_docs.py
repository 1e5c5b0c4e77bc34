"""The set-ups of docs/server.md that are marked as run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import serving

from flash_moe import Model
from flash_moe.server.app import build
from flash_moe.server.service import Service
from flash_moe.server.turns import Turns

pytestmark = pytest.mark.clients
PAGE = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"\*\*([^*]+)\*\* \(run\)\n\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Model.load("demo") as model, serving(build(Service(model, ["demo"], Turns(2, 8)))) as found:
        yield found


def test_snippets_are_found() -> None:
    assert list(SNIPPETS) == ["OpenAI SDK", "Anthropic SDK", "Pydantic AI", "LangChain"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_prints_an_answer(name: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = SNIPPETS[name].replace("http://127.0.0.1:8080", address)
    exec(compile(code, name, "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3
