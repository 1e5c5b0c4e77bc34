"""The installed library does its main jobs, with nothing of the repository and few packages.

Runs everywhere: in a clone, on the wheel from outside (tools/check_packages.py), and with the lowest versions of all
dependencies (tools/lowest_versions.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import flash_moe
from flash_moe import HubError, Model

QUESTION = "How much memory do I need for Qwen3.5-397B?"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def command(*arguments: object) -> str:
    """What the program `flash-moe` prints."""
    program = Path(sys.executable).with_name("flash-moe")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_type_checkers_see_types() -> None:
    assert resources.files("flash_moe").joinpath("py.typed").is_file()


def test_every_store_gives_the_same_tokens() -> None:
    replies = {}
    for expert_io in ("mapped", "slots", "resident"):
        with Model.load("demo", expert_io=expert_io) as model:
            replies[expert_io] = model.generate(QUESTION, temperature=0.0).tokens
    assert len(replies["mapped"]) > 20
    assert replies["mapped"] == replies["slots"] == replies["resident"]


def test_stream_tools_and_logits() -> None:
    with Model.load("demo", experts_per_token=None) as model:
        question = [{"role": "user", "content": "What is the weather in Oslo?"}]
        chunks = list(model.stream(question, tools=[TOOL], temperature=0.0))
        assert "get_weather" in "".join(chunk.raw_text for chunk in chunks)
        assert chunks[-1].stats.generated_tokens == len(chunks)
        assert model.logits([1, 2, 3]).shape[0] == 3


def test_a_repository_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="offline"):
        Model.load("org/name")


def test_the_program(tmp_path: Path) -> None:
    assert command("--version") == f"flash-moe {flash_moe.__version__}\n"
    assert "flash-moe generate" in command("--help")
    assert json.loads(command("info", "demo", "--json"))["experts"] == 32
    assert command("verify", "demo").startswith("OK: 256 expert records")
    assert "memory" in command("generate", "demo", QUESTION)
    assert json.loads(command("plan", "demo", "--machine", "M3 Max 48GB", "--json"))["memory"]["fits"]
    (tmp_path / "text.txt").write_text("The experts of a model stay on the disk. " * 8)
    assert "perplexity" in command("eval", "demo", "--text", tmp_path / "text.txt", "--limit", "1")
    command("convert", "demo", tmp_path / "packed")
    assert json.loads(command("verify", tmp_path / "packed", "--json"))["checksums"]
