"""The tools of `flash-moe chat`: reads functions from a file, and asks the user before one runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import signal
import sys
from pathlib import Path
from typing import Any

from ..machines.interrupts import handled_by
from .console import shown, write


def read_tools(path: Path) -> list[Any]:
    """Returns the functions that a Python file defines, or the schemas of a JSON file.

    Raises:
        OSError: the file cannot be read, or has another form.
    """
    if path.suffix == ".json":
        try:
            schemas = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path} is not JSON: {error}") from error
        return schemas if isinstance(schemas, list) else [schemas]
    if not path.is_file():
        raise OSError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path} is neither a Python file with functions nor a JSON file with schemas")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise OSError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    functions = inspect.getmembers(module, inspect.isfunction)
    return [f for name, f in functions if f.__module__ == path.stem and not name.startswith("_")]


def confirm(call: Any) -> bool:
    """Asks the user before a function runs. If no user can answer, the function does not run."""
    if not sys.stdin.isatty():
        return False
    question = f"run {shown(call.name)}({shown(json.dumps(call.arguments, ensure_ascii=False))})? [y/N] "
    cancelling = signal.getsignal(signal.SIGINT)
    try:
        with handled_by(signal.default_int_handler):  # so that Ctrl-C ends the question
            return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        write("\n")
        return False
    except KeyboardInterrupt:
        write("\n")
        if callable(cancelling):
            cancelling(signal.SIGINT, None)  # stops the reply
        return False
