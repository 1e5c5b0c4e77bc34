"""The server and the chat command with a model that runs on mlx-lm's network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from command_line import flash_moe_command
from family_checkpoints import checkpoint
from starlette.testclient import TestClient

from flash_moe import Model
from flash_moe.server.admission import Admission
from flash_moe.server.app import build
from flash_moe.server.service import Service
from flash_moe.shipped import shipped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoint("qwen3_moe", tmp_path_factory.mktemp("served") / "model", vocab_size=4096)
    shutil.copy(shipped("models/demo") / "chat_template.jinja", folder)
    return folder


def test_server(folder: Path) -> None:
    """Replies whole and as streams, two at a time, equal to those of the library."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0.0}
    with Model.load(folder) as model:
        model.tokenizer.eos_token_ids = frozenset()
        expected = model.generate(messages, max_tokens=8, temperature=0.0)
        client = TestClient(build(Service(model, ["tiny"], Admission(2, 2), None)), base_url="http://localhost")
        for _ in range(2):  # the second from a prefix
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == expected.text
            assert answer["usage"]["completion_tokens"] == 8
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
        pieces = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
        assert "".join(pieces) == expected.text
        answer = client.post("/v1/messages", json=body).json()
        assert answer["usage"]["output_tokens"] == 8


def test_chat(folder: Path) -> None:
    result = flash_moe_command("chat", folder, "--max-tokens", "4", stdin="Hello\n/help\n/stats\n")
    assert result.exit_code == 0, result.output
    assert "/help" in result.stdout
