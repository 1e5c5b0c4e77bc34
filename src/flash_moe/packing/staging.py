"""A folder that appears complete or not at all, filled in steps that survive being killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, DiskSpaceError

_PLAN = "conversion.json"


class Staging:
    """The folder ``DST.partial`` beside the destination: what is to become it, in ``content``, and notes on the work.

    A step's file is written under a temporary name, flushed to disk and renamed; a small JSON receipt is written after
    it. A step with a receipt is done and is not repeated when the same conversion is started again.

    Args:
        destination: the folder to make; must not exist.
        plan: describes the conversion; a partial folder of another plan is refused.

    Attributes:
        folder: where the files of the destination are made.

    Raises:
        CheckpointError: the destination exists, or the partial folder belongs to another conversion.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any]) -> None:
        self.destination = destination
        self._work = destination.with_name(destination.name + ".partial")
        self.folder = self._work / "content"
        self._plan = json.loads(json.dumps(plan))
        if destination.exists():
            raise CheckpointError(f"{destination} exists already; choose another destination, or delete it")
        if self._is_foreign():
            raise CheckpointError(
                f"{self._work} was left by another conversion (other source or options); "
                "start that one again to finish it, or delete the folder"
            )

    def require_space(self, nbytes: int) -> None:
        """Checks that ``nbytes`` in all fit, counting what is there already.

        Raises:
            DiskSpaceError: they do not; nothing was written.
        """
        parent = self.destination.parent.resolve()
        while not parent.exists():
            parent = parent.parent
        done = sum(file.stat().st_size for file in self.folder.glob("*") if ".tmp" not in file.suffixes)
        needed, free = nbytes - done, shutil.disk_usage(parent).free
        if needed > free:
            raise DiskSpaceError(
                f"{self.destination} needs {needed / 1e9:.2f} GB more, but {parent} has {free / 1e9:.2f} GB free; "
                "make room or choose another disk (nothing was written)"
            )

    def begin(self) -> None:
        """Makes the folder; what an interrupted step left is removed."""
        if not self.folder.exists() and self._work.exists():
            shutil.rmtree(self._work)  # notes on content that became a destination
        self._work.mkdir(parents=True, exist_ok=True)
        _write_text(self._work / _PLAN, json.dumps(self._plan))
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp*"):
            leftover.unlink()

    def receipt(self, name: str) -> Any:
        """What the finished step that made file ``name`` left, or None if it is still to be done."""
        return self._note(f"{name}.done") if (self.folder / name).exists() else None

    def temporary(self, name: str) -> Path:
        """Where to write file ``name`` before :meth:`commit`."""
        return self.folder / f"{name}.tmp.safetensors"

    def commit(self, name: str, receipt: Any) -> None:
        """Puts the temporary file in place and notes that the step is done."""
        temporary = self.temporary(name)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self.folder / name)
        _write_text(self._work / f"{name}.done", json.dumps(receipt))

    def forget(self, name: str) -> None:
        """Makes the step of file ``name`` one that is still to be done."""
        (self._work / f"{name}.done").unlink(missing_ok=True)

    def save(self, name: str, array: np.ndarray) -> None:
        """Keeps an array beside the content, in one piece, until it is discarded or the work is finished."""
        temporary = self._work / f"{name}.tmp"
        with temporary.open("wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._work / name)

    def saved(self, name: str) -> np.ndarray | None:
        """The array of that name, if there is one."""
        path = self._work / name
        return np.load(path) if path.exists() else None

    def discard(self, name: str) -> None:
        """Removes a saved array, if there is one."""
        (self._work / name).unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file in one piece."""
        _write_text(self.folder / name, text)

    def finish(self) -> None:
        """Gives the content its name, in one step, and removes the notes."""
        self.folder.rename(self.destination)
        shutil.rmtree(self._work)

    def _is_foreign(self) -> bool:
        """Whether the partial folder holds the work of another conversion, or none of ours."""
        held = [file for file in self._work.glob("*") if ".tmp" not in file.suffixes]
        plan = self._note(_PLAN)
        return bool(held) and plan != self._plan and (plan is None or self.folder.exists())

    def _note(self, name: str) -> Any:
        path = self._work / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
