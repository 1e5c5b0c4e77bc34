"""The command line as a process of its own: exit codes, signals, pipes, terminals."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import SUMMARY, process

from flash_moe.packing.verify import verify


@pytest.fixture
def endless_checkpoint(packed_checkpoint: Path, tmp_path: Path) -> Path:
    """``packed_checkpoint`` without end-of-sequence tokens."""
    folder = shutil.copytree(packed_checkpoint, tmp_path / "endless")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_process_failure() -> None:
    started = process("generate", "/does/not/exist", "hello")
    stdout, stderr = started.communicate(timeout=20)
    assert (started.returncode, stdout) == (1, b"")
    assert stderr.startswith(b"error: '/does/not/exist' does not exist") and stderr.count(b"\n") == 1


def test_ctrl_c_ends_a_stream(endless_checkpoint: Path) -> None:
    def heed_ctrl_c() -> None:  # a shell that runs the tests in the background has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    started = process("generate", endless_checkpoint, "hello", "--max-tokens", 4000, preexec_fn=heed_ctrl_c)
    assert started.stdout is not None
    assert started.stdout.read(3)  # the stream has begun
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=20)
    assert started.returncode == 130
    assert stdout.endswith(b"\n")
    assert (summary := SUMMARY.fullmatch(stderr.decode()))
    assert summary[4] == "interrupted"


def test_closed_pipe_ends_quietly(endless_checkpoint: Path) -> None:
    started = process("generate", endless_checkpoint, "hello", "--max-tokens", 4000)
    assert started.stdout is not None and started.stderr is not None
    assert started.stdout.read(3)
    started.stdout.close()
    assert started.stderr.read() == b""
    started.stderr.close()
    assert started.wait(timeout=20) == 141


HI = ["generate", "demo", "hi", "--max-tokens", "2"]


@pytest.mark.parametrize(
    ("arguments", "redirected", "code", "stdout", "stderr"),
    [
        pytest.param(HI, "2>&-", 0, "Hello!", "", marks=pytest.mark.slow),
        (HI, "<&- >&- 2>&-", 0, "", ""),
        (HI, ">/dev/full", 1, "", "error: [Errno 28] No space left on device\n"),
        pytest.param(HI, "2>/dev/full", 1, "Hello!", "", marks=pytest.mark.slow),
        (["generate", "demo"], "<&-", 2, "", "error: invalid value for 'PROMPT': it is empty"),
        (["--help"], "<&- >&-", 0, "", ""),
        (["--help"], ">/dev/full", 1, "", "error: [Errno 28] No space left on device\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_closed_and_full_streams(arguments: list[str], redirected: str, code: int, stdout: str, stderr: str) -> None:
    if "/dev/full" in redirected and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    started = process(*arguments, command=["sh", "-c", f'exec "$@" {redirected}', "sh"])
    out, err = (stream.decode() for stream in started.communicate(timeout=60))
    assert (started.returncode, "Traceback" in err, "Exception ignored" in err) == (code, False, False)
    assert (stdout in out, bool(out)) == (True, bool(stdout))
    assert (stderr in err, bool(err)) == (True, bool(stderr))


def test_a_file_does_not_get_the_number_of_a_closed_stream(packed_checkpoint: Path, tmp_path: Path) -> None:
    """Else what is printed ends up in a checkpoint."""
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    started = process("convert", packed_checkpoint, tmp_path / "packed", command=command)
    started.communicate(timeout=60)
    assert started.returncode == 0
    assert verify(tmp_path / "packed").records == verify(packed_checkpoint).records


def test_text_that_stdout_cannot_encode(endless_checkpoint: Path) -> None:
    started = process(
        "generate",
        endless_checkpoint,
        "hello",
        "--max-tokens",
        20,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    stdout, stderr = started.communicate(timeout=20)
    assert started.returncode == 0
    assert b"?" in stdout and b"Traceback" not in stderr


def test_on_a_terminal(endless_checkpoint: Path) -> None:
    parent, child = pty.openpty()
    try:
        started = process(
            "generate", endless_checkpoint, "hello", "--max-tokens", 40, stdin=child, stdout=child, stderr=child
        )
        assert started.wait(timeout=20) == 0
        missing = process("generate", endless_checkpoint, stdin=child, stdout=child, stderr=subprocess.PIPE)
        stderr = missing.communicate(timeout=20)[1]
        time.sleep(0.05)
        output = os.read(parent, 1 << 16).decode()
    finally:
        os.close(child)
        os.close(parent)
    text, _, summary = output.rpartition("\x1b[2m")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)  # a model cannot drive the terminal
    assert SUMMARY.fullmatch(re.sub(r"\s+", " ", summary.replace("\x1b[0m", "")).strip() + "\n")
    assert missing.returncode == 2
    assert b"pipe it in" in stderr and b"flash-moe chat" in stderr
