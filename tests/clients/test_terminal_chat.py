"""`flash-moe chat` in a terminal of 80 columns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

pytestmark = pytest.mark.clients
PROMPT = r"\x1b\[\?2004h"  # the terminal is asked to mark what is pasted: a prompt has begun
ENVIRONMENT = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1"}  # this terminal does not say where its cursor is
COMMAND = [sys.executable, "-m", "flash_moe", "chat", "demo", "--max-tokens", "60"]


def plain(text: str) -> str:
    """Text without the sequences that move the cursor and colour it."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r", "", text)


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    child = pexpect.spawn(
        COMMAND[0], COMMAND[1:], dimensions=(24, 80), encoding="utf-8", timeout=60, cwd=tmp_path, env=ENVIRONMENT
    )
    child.expect("Ctrl-D leaves")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def say(child: Any, line: str, expected: str) -> str:
    """Types a line and returns what came before and with what is expected."""
    child.send(line + "\r")
    child.expect(expected)
    shown = plain(child.before + child.after)
    child.expect(PROMPT)
    return shown


def leave(child: Any) -> None:
    """Ends the conversation with Ctrl-D, which must succeed."""
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_session(chat: Any, tmp_path: Path) -> None:
    first = say(chat, "What is the page cache?", r"% in\s+memory")
    assert "cache" in first.lower() and "K=4" in first
    again = say(chat, "Why?", r"reused\)")
    assert "reused" in again
    say(chat, "/save talk.flashmoe", "saved 4 messages")
    say(chat, "/undo", "2 messages are left")
    say(chat, "/open talk.flashmoe", "4 messages")
    say(chat, "/clear", "a new conversation")
    say(chat, "/k own", r"experts_per_token=10")
    say(chat, "/nothing", "there is no command /nothing")
    say(chat, "/open missing", "error")
    say(chat, "/help", "Alt-Enter")
    leave(chat)
    assert (tmp_path / "talk.flashmoe").exists()


def test_ctrl_c_stops_a_reply_and_keeps_the_conversation(chat: Any) -> None:
    say(chat, "What is the page cache?", r"% in\s+memory")
    chat.send("\x1b[200~" + "What is the page cache? " * 300 + "\x1b[201~\r")  # pasted; running it takes seconds
    chat.expect(r"\x1b\[\?2004l")  # the prompt has ended
    time.sleep(0.5)
    chat.sendcontrol("c")
    chat.expect("stopped")
    chat.expect(PROMPT)
    assert "reused" in say(chat, "Why?", r"% in\s+memory")
    say(chat, "/undo", "[24] messages are left")  # 4 if the stopped reply had begun
    leave(chat)


def test_lines_from_a_pipe() -> None:
    done = subprocess.run(
        COMMAND, input="What is the page cache?\n/stats\n", capture_output=True, text=True, check=True
    )
    assert "cache" in done.stdout.lower() and "tok/s" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize("key, result", [("c", "stopped"), ("d", "declined")])
def test_leaving_the_question_about_a_function(chat: Any, tmp_path: Path, key: str, result: str) -> None:
    (tmp_path / "tools.py").write_text(
        'def get_weather(city: str) -> str:\n    """Get the weather of a city."""\n    return "sunny"\n'
    )
    say(chat, "/tools tools.py", "1 tool")
    chat.send("What is the weather in Paris?\r")
    chat.expect(r"run get_weather\(.*\)\? \[y/N\] ")
    chat.sendcontrol(key)
    chat.expect(result)
    chat.expect(PROMPT)
    say(chat, "/save talk.flashmoe", r"saved \d messages")
    leave(chat)


def saved_roles(path: Path) -> list[str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [message["role"] for message in json.loads(header["__metadata__"]["content"])["state"]["messages"]]


def test_slips_keep_the_conversation_and_its_system_message(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_here\n")
    say(chat, "/system Answer briefly.", "a new conversation")
    say(chat, "What is the page cache?", r"% in\s+memory")
    say(chat, "/save it's.flashmoe", "saved 3 messages")
    say(chat, "/save /nonexist/x", "No such file or directory")
    say(chat, "/k foo", "neither a number")
    say(chat, "/k 99", "experts_per_token is 99")
    say(chat, "/tools broken.py", r"cannot be\s+imported")
    say(chat, "/system", "a new conversation")
    say(chat, "/open it's.flashmoe", "3 messages")
    say(chat, "/k 4", "K=4|experts_per_token=4")
    say(chat, "/tools", "0 tools")
    say(chat, "Why?", r"% in\s+memory")
    say(chat, "/save second.flashmoe", "saved 5 messages")
    assert saved_roles(tmp_path / "second.flashmoe") == ["system", *2 * ["user", "assistant"]]
