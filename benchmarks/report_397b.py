"""Rows of measurements: Markdown for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Report:
    """Markdown tables on stdout, and the same as JSON lines in a file; both as soon as a row is known."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._columns = path, ()

    def row(self, table: str, **values: Any) -> None:
        """A row of a table, whose head is printed whenever another table or other columns came before."""
        columns = (table, *values)
        if columns != self._columns:
            print(f"\n| {' | '.join(name.replace('_', ' ') for name in columns)} |\n|{'---|' * len(columns)}")
            self._columns = columns
        print(f"| | {' | '.join(_shown(value) for value in values.values())} |", flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"table": table, **values}) + "\n")

    def say(self, text: str) -> None:
        """A line about progress."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)
