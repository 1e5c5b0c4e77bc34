"""Small JSON files in the user's cache folder, with measurements of this machine."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def cache_file(name: str) -> Path:
    """Returns the path of a file in the user's cache folder."""
    standard = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(standard)  # noqa: PTH111 (there may be no home)
    return Path(folder) / "flash_moe" / name


def recall(name: str, version: int) -> dict[str, Any]:
    """Returns the entries of a file; empty if the file is missing, damaged or of another version."""
    file = cache_file(name)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] == version and isinstance(entries := data["entries"], dict):
            return entries
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.debug("%s is not used: %s", file, error)
    return {}


def remember(name: str, version: int, key: str, change: Callable[[Any], Any], most: int) -> None:
    """Replaces the entry ``key`` of a file by ``change(entry)``, and keeps the ``most`` latest entries.

    ``change`` gets None if there is no such entry. The file is replaced atomically, and entries of other processes are
    kept. A failure is logged, and only this entry is lost.
    """
    file = cache_file(name)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = recall(name, version)
            entry = change(entries.pop(key, None))
            latest = dict(list(entries.items())[1 - most :] if most > 1 else ()) | {key: entry}
            temporary.write_text(json.dumps({"format": version, "entries": latest}, indent=1), encoding="utf-8")
            temporary.replace(file)
    except OSError as error:
        logger.debug("%s could not be written: %s", file, error)
