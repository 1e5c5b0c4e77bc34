"""Limits of the memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """Returns the bytes of memory that this process may use, within its control group (Linux)."""
    group = group_limit()
    return machine_memory() if group is None else min(group, machine_memory())


def machine_memory() -> int:
    """Returns the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group_limit() -> int | None:
    """Returns the smallest limit of this process's control group and its parents (Linux); None without one."""
    found = []
    for file in _limit_files():
        try:
            text = file.read_text().strip()
        except OSError:
            continue  # the group does not exist here
        if text.isdigit():  # and not "max"
            found.append(int(text))
    return min(found, default=None)


def resident_bytes() -> int:
    """Returns the bytes of memory that this process uses now; 0 if they cannot be determined."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _limit_files() -> Iterator[Path]:
    """Yields the files with limits: version 1 in a folder ``memory``, version 2 in the root or ``unified``."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    paths = {"": "/", "memory": "/"}  # by controller; inside a container, the root is its own group
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
