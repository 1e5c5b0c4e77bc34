"""The memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Returns bytes of memory this process may use: the machine's, or its control group's where that is less (Linux)."""
    group = group_limit()
    return machine_memory() if group is None else min(group, machine_memory())


def machine_memory() -> int:
    """Returns bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group_limit() -> int | None:
    """Returns the least limit of this process's control group and the groups around it; None where there is none
    (Linux).
    """
    found = []
    for file in _limit_files():
        try:
            text = file.read_text().strip()
        except OSError:
            continue  # no such group here
        if text.isdigit():  # and not "max"
            found.append(int(text))
    return min(found, default=None)


def resident_bytes() -> int:
    """Returns bytes of memory that this process uses now; 0 where nobody knows."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _limit_files() -> Iterator[Path]:
    """Where limits stand: control groups of version 1 in a folder ``memory``, of version 2 in the root or ``unified``."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    paths = {"": "/", "memory": "/"}  # by controller; inside a container its own group is the root
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            if path and controller in paths:
                paths[controller] = path
    for controller, name, roots in (
        ("memory", "memory.limit_in_bytes", (_ROOT / "memory",)),
        ("", "memory.max", (_ROOT, _ROOT / "unified")),
    ):
        group = Path(paths[controller].lstrip("/"))
        for root in roots:
            for inner in (group, *group.parents):
                yield root / inner / name
