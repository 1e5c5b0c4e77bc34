"""A control group that limits the memory of a process and of the page cache it fills (Linux, as root)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


@dataclass(frozen=True)
class MemoryGroup:
    """A group without swap.

    Attributes:
        folder: of its files.
        highest, swap: files with the most bytes it has used, and with the bytes swapped out.
    """

    folder: Path
    highest: str
    swap: str

    @property
    def command(self) -> list[str]:
        """What goes in front of a command to run it in the group."""
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"]

    def highest_bytes(self) -> int:
        """The most memory it has used."""
        return int((self.folder / self.highest).read_text())

    def swapped_bytes(self) -> int:
        """What of it is swapped out."""
        text = (self.folder / self.swap).read_text()
        if self.swap != "memory.stat":
            return int(text)
        counters = dict(line.split() for line in text.splitlines())
        return int(counters.get("total_swap", 0))  # absent where the system has no swap


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group of at most ``limit`` bytes, by cgroup v1 or v2, whichever has the memory here.

    Raises:
        OSError: the system has no such groups, or this user may not make them.
    """
    if V1.exists():
        group = MemoryGroup(V1 / f"flash_moe_{os.getpid()}", "memory.max_usage_in_bytes", "memory.stat")
        settings = {"memory.limit_in_bytes": limit, "memory.swappiness": 0}
    else:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
        group = MemoryGroup(ROOT / f"flash_moe_{os.getpid()}", "memory.peak", "memory.swap.current")
        settings = {"memory.max": limit, "memory.swap.max": 0}
    group.folder.mkdir()
    try:
        for name, value in settings.items():
            (group.folder / name).write_text(str(value))
        yield group
    finally:
        group.folder.rmdir()
