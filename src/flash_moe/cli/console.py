"""What goes to stderr: errors, warnings, remarks and log lines; and the exit codes."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import FlashMoEError

FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141  # the last two are 128 + the number of the signal, as shells have it
DIM, _RED, _YELLOW = "2", "1;31", "1;33"


class Commands(TyperGroup):
    """The commands, with every failure that is no bug told in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except FlashMoEError as error:
            fail(" ".join(str(error).split()))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # The interpreter flushes stdout once more on its way out; by then it must lead somewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from error
        except OSError as error:
            fail(str(error))
            raise typer.Exit(FAILED) from error


def say(message: str, *, label: str = "", style: str = "") -> None:
    """Writes one line to stderr; a terminal gets it in colour and wrapped between words.

    Args:
        label: put before the message with a colon, in ``style``; without a label the whole line has the style.
    """
    line = f"{label}: {message}" if label else message
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        if style and not os.environ.get("NO_COLOR"):
            end = len(label) + 1 if label else len(line)
            line = f"\x1b[{style}m{line[:end]}\x1b[0m{line[end:]}"
    print(line, file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Writes an error to stderr."""
    say(message, label="error", style=_RED)


def warn(message: str) -> None:
    """Writes a warning to stderr."""
    say(message, label="warning", style=_YELLOW)


def log_to_stderr(verbose: bool) -> None:
    """Shows the library's warnings, and with ``verbose`` all that it logs."""
    logger = logging.getLogger(__package__.partition(".")[0])
    logger.handlers = [_Handler()]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


class _Handler(logging.Handler):
    """Looks up stderr for every line, so that a progress bar can put the line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        else:
            say(f"{record.name}: {record.getMessage()}", style=DIM)
