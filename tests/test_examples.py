"""The examples run as a user would run them, on the model that comes with the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "cancelling": "bit for bit",
    "conversation": "tokens of the prompt were read from the file",
    "formats": "Order(item=",
    "several_machines": "rank 0 fetched",
    "quickstart": "5.2 GB for the weights that every token reads",
    "streaming": "recently read files",
    "tool_calls": 'get_weather({"city": "Oslo", "days": 3}) -> {',
}


OF_MLX_LM = ("stream_mlx_lm", "serve_mlx_lm")  # tests/adapted and tests/clients run them


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS, *OF_MLX_LM}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


@pytest.mark.parametrize("name", SAYS)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40
