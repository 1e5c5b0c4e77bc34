"""mlx_lm.server with streamed experts answers as it does without, one request or several at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "adapted"))
from family_checkpoints import checkpoint

pytestmark = pytest.mark.clients
STREAMED = [str(Path(__file__).parents[2] / "examples" / "serve_mlx_lm.py")]
PLAIN = ["-m", "mlx_lm.server"]
PROMPTS = ["Why is the sky blue?", "Experts are read from files.", "One, two, three"]


@contextmanager
def serving(program: list[str], folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1"}  # the CPU's compiler takes long
    command = [sys.executable, *program, "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, prompt: str) -> Any:
    """The text of 12 greedy tokens, and their log-probabilities to 3 digits."""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["text"], [(token["id"], round(token["logprob"], 3)) for token in choice["logprobs"]["content"]]


def answers(program: list[str], folder: Path) -> tuple[list[Any], list[Any]]:
    """One after the other, the first twice; and all at a time."""
    with serving(program, folder) as address, ThreadPoolExecutor(3) as pool:
        return [ask(address, p) for p in [*PROMPTS, PROMPTS[0]]], list(pool.map(lambda p: ask(address, p), PROMPTS))


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_answers_are_those_of_the_plain_server(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / name, vocab_size=4096)
    expected, streamed = answers(PLAIN, folder), answers(STREAMED, folder)
    assert streamed[0] == expected[0]
    assert streamed[0][0] == streamed[0][-1]
    assert [text for text, *_ in streamed[1]] == [text for text, *_ in expected[1]]
