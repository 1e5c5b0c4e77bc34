"""The process of a command: exit codes, messages on stderr, and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import ArgumentError, FlashMoEError

# The last two are 128 + the number of the signal, as in shells.
FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
DIM, _RED, _YELLOW = "2", "1;31", "1;33"
_PROGRESS = "flash_moe.progress"  # the log of all progress
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_UsageError: Any = typer.BadParameter.__bases__[0]  # typer does not export it


class Commands(TyperGroup):
    """The group of all commands. An expected failure gives one line on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **_: Any
    ) -> NoReturn:
        """Runs a command and ends the process."""
        sys.exit(self._run(list(sys.argv[1:] if args is None else args), prog_name or "flash-moe"))

    def _run(self, args: list[str], program: str) -> int:
        try:
            with self.make_context(program, args) as ctx:
                self.invoke(ctx)
                sys.stdout.flush()
            return 0
        except typer.Exit as error:
            return error.exit_code
        except (KeyboardInterrupt, typer.Abort):
            return INTERRUPTED
        except _UsageError as error:
            message = error.format_message().strip().removesuffix(".")
            if "extra argument" in message:
                message += "; put a text of several words in quotes"
            end = " See" if message.endswith("?") else "; see"
            command = args[0] if args and args[0] in self.commands else ""
            where = error.ctx.command_path if error.ctx is not None else f"{program} {command}".strip()
            fail(f"{message[:1].lower()}{message[1:]}{end} {where} --help")
            return USAGE
        except FlashMoEError as error:
            fail(str(error))
            return USAGE if isinstance(error, ArgumentError) else FAILED
        except BrokenPipeError:
            _discard_output()
            return PIPE_CLOSED
        except OSError as error:
            fail(described(error))
            _discard_output()
            return FAILED


def _discard_output() -> None:
    """Discards buffered output of a broken stdout or stderr, which the interpreter would flush at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed_streams() -> None:
    """Opens the null device for closed standard streams (``>&-``), before another file gets their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 (open for as long as the process)


def at_terminal() -> bool:
    """Returns whether stderr is a terminal."""
    return sys.stderr.isatty()


def print_json(data: Any) -> None:
    """Prints one JSON object. Numbers that JSON does not support (NaN, infinity) become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def say(message: str, *, label: str = "", style: str = "") -> None:
    """Writes one line to stderr. In a terminal, it has colour and is wrapped between words.

    Args:
        label: text before the message, followed by a colon, in ``style``. Without a label, the whole line has the
            style.
    """
    line = f"{label}: {message}" if label else message
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        if style and not os.environ.get("NO_COLOR"):
            end = len(label) + 1 if label else len(line)
            line = f"\x1b[{style}m{line[:end]}\x1b[0m{line[end:]}"
    print(line, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Returns a text without escape sequences, so that the output of a model cannot control the terminal."""
    return text.translate(_CONTROL)


def write(text: str, style: str = "") -> None:
    """Writes a piece of a reply to stdout. In a file or a pipe, the text is unchanged."""
    if sys.stdout.isatty():
        text = shown(text)
        if style and text and not os.environ.get("NO_COLOR"):
            text = f"\x1b[{style}m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()


def described(error: Exception) -> str:
    """Returns the message of an error for people. Errors of the system become "file: reason", without a number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def fail(message: str) -> None:
    """Writes an error to stderr in one line."""
    with contextlib.suppress(OSError):  # the exit code reports the error too
        say(" ".join(message.split()), label="error", style=_RED)


def warn(message: str) -> None:
    """Writes a warning to stderr."""
    say(message, label="warning", style=_YELLOW)


def log_to_stderr(verbose: bool) -> None:
    """Shows the warnings of the library on stderr, and with ``verbose`` its whole log."""
    logger = logging.getLogger(__package__.partition(".")[0])
    logger.handlers = [_Handler()]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger(_PROGRESS).setLevel(logging.INFO)


class _Handler(logging.Handler):
    """Looks up stderr for every line, so that a progress bar can put the line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            message += shown(f": {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        if record.levelno >= logging.WARNING:
            warn(message)
        elif record.name == _PROGRESS:
            say(message)
        else:
            say(f"{record.name}: {message}", style=DIM)
        if error is not None and logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            for line in "".join(traceback.format_exception(error)).splitlines():
                say(shown(line), style=DIM)
