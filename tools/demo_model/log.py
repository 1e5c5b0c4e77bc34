"""What a run says: lines with the time, on stdout and in a file, and facts as JSON lines."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("demo_model")


def configure(file: Path | None = None) -> None:
    """Sends all lines to stdout and, appended, to ``file``; several processes may share it."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


class Log:
    """Lines, and the same facts as JSON lines in a file of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, text: str, **facts: Any) -> None:
        LOGGER.info(text)
        if facts:
            with self.path.open("a") as file:
                file.write(json.dumps(facts) + "\n")
