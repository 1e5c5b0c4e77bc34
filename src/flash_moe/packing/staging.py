"""A folder that appears complete or not at all, filled in steps that survive being killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DiskSpaceError

_PLAN = "conversion.json"


class Staging:
    """The folder ``DST.partial`` beside the destination.

    A step's file is written under a temporary name, flushed to disk and renamed; a small JSON receipt is written after
    it. A step with a receipt is done and is not repeated when the same conversion is started again.

    Args:
        destination: the folder to make; must not exist.
        plan: describes the conversion; a partial folder of another plan is refused.

    Raises:
        CheckpointError: the destination exists, or the partial folder belongs to another conversion.
    """

    def __init__(self, destination: Path, plan: Mapping[str, Any]) -> None:
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        self._plan = json.loads(json.dumps(plan))
        if destination.exists():
            raise CheckpointError(f"{destination} exists already; choose another destination, or delete it")
        self._check_plan()

    def _check_plan(self) -> None:
        path = self.folder / _PLAN
        if not self.folder.exists():
            return
        found = json.loads(path.read_text()) if path.exists() else None
        if found != self._plan and any(self.folder.iterdir()):
            raise CheckpointError(
                f"{self.folder} was left by another conversion (other source or options); "
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
        done = sum(file.stat().st_size for file in self.folder.glob("*")) if self.folder.exists() else 0
        needed, free = nbytes - done, shutil.disk_usage(parent).free
        if needed > free:
            raise DiskSpaceError(
                f"{self.destination} needs {needed / 1e9:.2f} GB more, but {parent} has {free / 1e9:.2f} GB free; "
                "make room or choose another disk (nothing was written)"
            )

    def begin(self) -> None:
        """Makes the folder; what an interrupted step left is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_text(_PLAN, json.dumps(self._plan))
        for leftover in self.folder.glob("*.tmp*"):
            leftover.unlink()

    def receipt(self, name: str) -> Any:
        """What the finished step that made file ``name`` left, or None if it is still to be done."""
        path = self.folder / f"{name}.done"
        return json.loads(path.read_text()) if path.exists() and (self.folder / name).exists() else None

    def temporary(self, name: str) -> Path:
        """Where to write file ``name`` before :meth:`commit`."""
        return self.folder / f"{name}.tmp.safetensors"

    def commit(self, name: str, receipt: Any) -> None:
        """Puts the temporary file in place and notes that the step is done."""
        temporary = self.temporary(name)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self.folder / name)
        self.write_text(f"{name}.done", json.dumps(receipt))

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file in one piece."""
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / name)

    def finish(self) -> None:
        """Removes the receipts and gives the folder its name."""
        for receipt in [*self.folder.glob("*.done"), self.folder / _PLAN]:
            receipt.unlink()
        self.folder.rename(self.destination)
