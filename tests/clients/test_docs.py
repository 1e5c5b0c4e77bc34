"""Every command and every Python block of README and docs/ runs, in the order of its page, unless it says what it needs.

A block that uses the address of a server talks to one that serves the demo model.
"""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest
from browser import serving

from flash_moe import Model
from flash_moe.server.admission import Admission
from flash_moe.server.app import build
from flash_moe.server.service import Service

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from command_line import flash_moe_command
from snippets import NEEDS, PAGES, ROOT, blocks, runs

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
NAMES = {"MODEL": "demo", "FLOATS": str(ROOT / "models/demo-bf16")}
ADDRESS = "http://127.0.0.1:8080"
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
WITH_COMMANDS = [page for page in PAGES if any(runs(line) for block in blocks(page) for line in block.commands)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Model.load("demo") as model, serving(build(Service(model, ["demo"], Admission(2, 8)))) as found:
        yield found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that pages speak of."""
    for name, source in (("chats.jsonl", "conversations"), ("calls.jsonl", "tool_calls")):
        with (ROOT / f"models/eval/{source}.jsonl").open(encoding="utf-8") as lines:
            (tmp_path / name).write_text("".join(islice(lines, 8)), encoding="utf-8")
    (tmp_path / "my_functions.py").write_text("def now() -> str:\n    return 'noon'\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python(page: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and not NEEDS.search(block.text.partition("\n")[0]):
            code = "\n" * (block.line - 1) + block.text.replace(ADDRESS, address)
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
            shown = capsys.readouterr().out
            assert shown.strip() or "print(" not in block.text, f"{page.name}:{block.line} printed nothing"
    model = names.get("model")
    if isinstance(model, Model):
        model.close()
    names.clear()
    gc.collect()  # now, where it may warn: what SDKs leave open is not ours to close


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands(page: Path) -> None:
    for line in [line for block in blocks(page) for line in block.commands if runs(line)]:
        words = [NAMES.get(word, word) for word in shlex.split(line, comments=True)][1:]
        if words[0] in ("serve", "chat"):
            stays(words, line)
            continue
        if words[0] == "convert":
            shutil.rmtree(words[2], ignore_errors=True)  # another page's line made it, too
        result = flash_moe_command(*words)
        assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"
        assert result.stdout or words[0] == "list", line


def stays(words: list[str], line: str) -> None:
    """Asserts that a command that runs until it is ended begins, and ends as it should."""
    port = ["--port", "0"] if words[0] == "serve" else []
    ended_by = subprocess.PIPE if words[0] == "chat" else subprocess.DEVNULL
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "flash_moe", *words, *port]
    with subprocess.Popen(
        command, stdin=ended_by, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            if words[0] == "chat":
                shown, said = process.communicate("What is K?\n", timeout=120)  # then the end of the input
                assert process.returncode == 0, f"{line}: {said}"
                assert shown.strip(), line
                return
            assert process.stderr is not None
            address = next(said.split()[2].rstrip(";") for said in process.stderr if said.startswith("listening on"))
            assert httpx.get(f"{address}/health", timeout=60).status_code == 200, line
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM), line
        finally:
            process.kill()
