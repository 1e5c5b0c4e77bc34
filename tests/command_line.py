"""Runs `flash-moe` for tests, in this process or as one of its own, and recognises what it says."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from flash_moe.cli import app

SOURCE = Path(__file__).parents[1] / "src"
SUMMARY = re.compile(  # groups: tokens generated, K, that K was reduced, remarks
    r"\d+ prompt tokens at [\d.]+ tok/s · (\d+) generated at [\d.]+ tok/s · K=(\d+)( of the model's 4)?"
    r" · [\d.]+ [kM]B of experts per token · \d+% in memory(?: · (.+))?\n"
)


def flash_moe_command(*arguments: object, stdin: bytes | str | None = None) -> Result:
    """Runs a command in this process, in 80 columns and without a terminal."""
    logger = logging.getLogger("flash_moe")
    handlers, level = logger.handlers, logger.level
    try:
        return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(
            app, [str(a) for a in arguments], input=stdin, prog_name="flash-moe"
        )
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def process(*arguments: object, command: Sequence[str] = (), **options: object) -> subprocess.Popen[bytes]:
    """Starts a command as a process of its own; ``command``, if given, runs it."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "80", **options.pop("env", {})}
    started = [*command, sys.executable, "-m", "flash_moe", *map(str, arguments)]
    return subprocess.Popen(
        started, env=environment, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    )


def failed(result: Result, code: int = 1) -> str:
    """The message of a command that failed as it should: on stderr, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removesuffix("\n")
