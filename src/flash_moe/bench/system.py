"""What the operating system says: memory of the machine, and bytes that this process read from a disk."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from ..limits import memory_limit

_MEMORY = Path("/proc/meminfo")
_IO = Path("/proc/self/io")


def machine_name() -> str:
    """System, architecture and number of cores."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def available_memory() -> int:
    """Bytes that programs and the page cache can have: Linux's estimate, elsewhere three quarters of the memory."""
    if _MEMORY.exists():
        for line in _MEMORY.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return memory_limit() * 3 // 4


def disk_bytes_read() -> int | None:
    """Bytes that this process has made storage deliver since it began; None where the system does not count them."""
    if sys.platform != "linux":
        return None
    counters = dict(line.split(": ") for line in _IO.read_text().splitlines())
    return int(counters["read_bytes"])
